"""Orders that need no search: greedy by score per cost, and random."""

import numpy as np

from flexiq_jax.orders.space import Space


def greedy(space: Space, scores: np.ndarray) -> np.ndarray:
  """Smallest error per MAC first (docs/flexiq.md, step D).

  Args:
    space: the channel groups.
    scores: float `[T]`, error of each group alone.

  Returns:
    int `[T]`, group numbers in the order in which they go to 4 bits; ties in flat order.

  Raises:
    ValueError: scores of the wrong length, or not finite.
  """
  if scores.shape != (space.total,):
    raise ValueError(f"scores: shape {scores.shape}, expected ({space.total},)")
  if not np.isfinite(scores).all():
    raise ValueError(f"scores: {int((~np.isfinite(scores)).sum())} of them are not finite")
  return np.argsort(scores / space.cost, kind="stable")


def random(space: Space, seed: int) -> np.ndarray:
  """A uniformly random order, int `[T]`."""
  return np.random.default_rng(seed).permutation(space.total)
