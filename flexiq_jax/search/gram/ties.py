"""Ties: neighbouring channel groups of a layer that are searched as one.

A Gram matrix of T groups takes T^2 numbers. Where a model has too many groups (a ViT-B has 16,000
groups of 4 channels), groups of one layer that are neighbours by error per cost are tied together.
"""

import numpy as np

from flexiq_jax.orders import Space


class Ties:
  """A space of tied groups, and the ways between it and the space of single groups.

  Attributes:
    space: the tied groups; equal to the original space where nothing is tied.
    size: groups in a tie, at most.
  """

  def __init__(self, space: Space, scores: np.ndarray, limit: int):
    """Ties as few groups as `limit` allows.

    Args:
      space: the channel groups.
      scores: float `[T]`, error of each group alone.
      limit: most ties; at least one for each layer is made in any case.
    """
    self.size = 1
    while self.size < max(space.sizes) and sum(-(-j // self.size) for j in space.sizes) > limit:
      self.size += 1
    self._fine = space
    self._scores = scores / space.cost
    if self.size == 1:
      self._members, self.space = [np.array([g]) for g in range(space.total)], space
    else:
      self._members, channels, macs = [], [], []
      starts = np.cumsum((0, *space.sizes))
      for start, groups in zip(starts[:-1], space.sizes, strict=True):
        ranked = start + np.argsort(self._scores[start : start + groups], kind="stable")
        ties = [ranked[i : i + self.size] for i in range(0, groups, self.size)]
        self._members += ties
        channels.append([int(space.channels[t].sum()) for t in ties])
        macs.append(int(space.cost[start]) * space.unit // int(space.channels[start]))
      self.space = Space.create(space.names, channels, macs)
    self.of = np.empty(space.total, np.int64)  # the tie of each group
    for tie, members in enumerate(self._members):
      self.of[members] = tie

  def expand(self, masks: np.ndarray) -> np.ndarray:
    """Masks of ties, bool `[..., T']` -> of groups, bool `[..., T]`."""
    return masks[..., self.of]

  def sum(self, effects: np.ndarray) -> np.ndarray:
    """Effects of groups, `[..., T]` -> of ties, `[..., T']`."""
    if self.size == 1:
      return effects
    order = np.concatenate(self._members)
    starts = np.cumsum([0, *map(len, self._members[:-1])])
    return np.add.reduceat(effects[..., order], starts, axis=-1)

  def coarse(self, order: np.ndarray) -> np.ndarray:
    """An order of groups -> one of ties, by the mean place of their groups."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    return np.argsort([place[members].mean() for members in self._members], kind="stable")

  def fine(self, order: np.ndarray) -> np.ndarray:
    """An order of ties -> one of groups; inside a tie by error per cost."""
    return np.concatenate([self._members[tie] for tie in order])
