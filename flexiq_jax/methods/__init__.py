"""Layer-wise comparison methods: which bit width for which layer, from arrays of sensitivities."""

from flexiq_jax.methods.program import Choices, Plan, Problem
from flexiq_jax.methods.solvers import SOLVERS, enumerate_all, local_search, milp, scip, solve

__all__ = [
  "SOLVERS",
  "Choices",
  "Plan",
  "Problem",
  "enumerate_all",
  "local_search",
  "milp",
  "scip",
  "solve",
]
