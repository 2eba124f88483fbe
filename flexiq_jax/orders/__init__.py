"""Which channel groups go to 4 bits first: the search space, scores, orders and schedules."""

from flexiq_jax.orders.arrangement import groups_per_block, shift_blocks, sorted_within
from flexiq_jax.orders.greedy import greedy, random
from flexiq_jax.orders.schedule import Schedule
from flexiq_jax.orders.scores import exact_scores, range_scores
from flexiq_jax.orders.space import Space

__all__ = [
  "Schedule",
  "Space",
  "exact_scores",
  "greedy",
  "groups_per_block",
  "random",
  "range_scores",
  "shift_blocks",
  "sorted_within",
]
