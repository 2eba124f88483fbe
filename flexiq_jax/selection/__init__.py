"""Which channel groups go to 4 bits first: the search space, scores, orders and schedules."""

from flexiq_jax.selection import evolution
from flexiq_jax.selection.evolution import EvolutionSettings
from flexiq_jax.selection.greedy import greedy, random
from flexiq_jax.selection.layout import shift_blocks, sorted_within
from flexiq_jax.selection.schedule import Schedule
from flexiq_jax.selection.scores import exact_scores, range_scores
from flexiq_jax.selection.space import Space
from flexiq_jax.selection.surrogate import Quadratic, anneal, arrange, fill, ledoit_wolf

__all__ = [
  "EvolutionSettings",
  "Quadratic",
  "Schedule",
  "Space",
  "anneal",
  "arrange",
  "evolution",
  "exact_scores",
  "fill",
  "greedy",
  "ledoit_wolf",
  "random",
  "range_scores",
  "shift_blocks",
  "sorted_within",
]
