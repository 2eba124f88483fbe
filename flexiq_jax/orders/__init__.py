"""Which channel groups go to 4 bits first: the search space, scores, orders, schedules, recipes.

Beside these names `recipes` and `weights`, which read and write them, are for use from outside.
"""

from flexiq_jax.orders.arrangement import groups_per_block, shift_blocks, sorted_within
from flexiq_jax.orders.greedy import greedy, random
from flexiq_jax.orders.recipes import LEVELS, Recipe, RecipeLayer, require_fit
from flexiq_jax.orders.schedule import Schedule, threshold
from flexiq_jax.orders.scores import exact_scores, range_scores
from flexiq_jax.orders.space import Space

__all__ = [
  "LEVELS",
  "Recipe",
  "RecipeLayer",
  "Schedule",
  "Space",
  "exact_scores",
  "greedy",
  "groups_per_block",
  "random",
  "range_scores",
  "require_fit",
  "shift_blocks",
  "sorted_within",
  "threshold",
]
