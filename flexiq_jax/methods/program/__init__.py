"""Integer programs of bit widths: which width for which layer, and what solves them."""

from flexiq_jax.methods.program.problem import Choices, Problem, Solution
from flexiq_jax.methods.program.solvers import SOLVERS, solve

__all__ = ["SOLVERS", "Choices", "Problem", "Solution", "solve"]
