"""Which channel groups go to 4 bits first: the search space, scores, orders and schedules."""

from flexiq_jax.selection import evolution
from flexiq_jax.selection.evolution import EvolutionSettings
from flexiq_jax.selection.greedy import greedy, random
from flexiq_jax.selection.schedule import Schedule
from flexiq_jax.selection.scores import exact_scores, range_scores
from flexiq_jax.selection.space import Space

__all__ = [
  "EvolutionSettings",
  "Schedule",
  "Space",
  "evolution",
  "exact_scores",
  "greedy",
  "random",
  "range_scores",
]
