"""The parts of the comparison of methods (experiments/compare.py)."""
