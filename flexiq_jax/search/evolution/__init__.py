"""Evolutionary search over orders, FlexiQ's Algorithm 1: keys, operators, and the loop."""
