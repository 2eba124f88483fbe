"""Evolutionary search over orders, FlexiQ's Algorithm 1: keys, operators, and the loop.

What others use is offered here; the modules of this folder are its own.
"""

from flexiq_jax.search.evolution.keys import Encoding, decode
from flexiq_jax.search.evolution.loop import evolve, run
from flexiq_jax.search.evolution.operators import ask, init, seeds, tell

__all__ = ["Encoding", "ask", "decode", "evolve", "init", "run", "seeds", "tell"]
