"""`Schedule`: one total order of all channel groups, read at any ratio.

Group i is 4-bit at ratio r iff the cost of the groups before it is below r of the total. So r is
reached, and exceeded by less than one group; 0 is exactly none and 1 exactly all; and the groups of
a lower ratio are always among those of a higher one (docs/flexiq.md, Invariants).
"""

import dataclasses
import fractions
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.orders.space import Space


@dataclasses.dataclass(frozen=True)
class Schedule:
  """An order of all channel groups of a space.

  Attributes:
    space: the channel groups.
    order: int `[T]`, a permutation of the group numbers: who goes to 4 bits first.

  Raises:
    ValueError: `order` is not a permutation.
  """

  space: Space
  order: np.ndarray

  def __post_init__(self):
    total = self.space.total
    if not np.array_equal(np.sort(self.order), np.arange(total)):
      missing = np.setdiff1d(np.arange(total), self.order)
      raise ValueError(
        f"order: {len(self.order)} entries, not a permutation of the {total} channel groups"
        + (f"; group {missing[0]} is missing" if len(missing) else "")
      )

  def __repr__(self) -> str:
    return f"Schedule({self.space.total} groups of {len(self.space.names)} layers)"

  def prefix(self, ratio: float) -> int:
    """How many groups of the order are 4-bit at a ratio in 0..1."""
    before = np.cumsum(self.space.cost[self.order]) - self.space.cost[self.order]
    return int(np.searchsorted(before, threshold(self.space, ratio), side="left"))

  def mask(self, ratio: float) -> np.ndarray:
    """Which groups are in 4 bits at a ratio, bool `[T]`."""
    flat = np.zeros(self.space.total, bool)
    flat[self.order[: self.prefix(ratio)]] = True
    return flat

  def stack(self, ratios: Sequence[float]) -> np.ndarray:
    """The masks of several ratios, bool `[V, T]`."""
    return np.stack([self.mask(ratio) for ratio in ratios])

  def masks(self, ratio: Any) -> dict[str, Any]:
    """Layer name -> bool `[J_l]`; a traced ratio counts in millionths, and within 0..1."""
    if isinstance(ratio, jax.core.Tracer):
      return self.space.split(jnp.round(jnp.float32(1e6) * ratio) >= self._first)
    return self.space.split(self.mask(ratio))

  @functools.cached_property
  def _first(self) -> np.ndarray:
    """The least ratio in millionths at which each group is 4-bit, int32 `[T]`."""
    cost = self.space.cost[self.order]
    first = np.empty(self.space.total, np.int32)
    first[self.order] = (np.cumsum(cost) - cost) * 10**6 // cost.sum() + 1
    return first

  def boundaries(self, ratio: float) -> dict[str, int]:
    """Layer name -> how many of its groups, taken in schedule order, are in 4 bits."""
    return {name: int(m.sum()) for name, m in self.masks(ratio).items()}

  def layer_order(self) -> dict[str, np.ndarray]:
    """Layer name -> its groups `[J_l]` in schedule order: the layout that makes 4 bits a prefix."""
    layers = self.space.layer[self.order]
    starts = np.cumsum((0, *self.space.sizes))
    return {name: self.order[layers == i] - starts[i] for i, name in enumerate(self.space.names)}

  def mac_share(self, ratio: float) -> float:
    """True share of the selectable MACs in 4 bits at a ratio."""
    return float(self.space.cost[self.mask(ratio)].sum() / self.space.cost.sum())

  def channel_share(self, ratio: float) -> float:
    """True share of the selectable feature channels in 4 bits at a ratio."""
    return float(self.space.channels[self.mask(ratio)].sum() / self.space.channels.sum())


def threshold(space: Space, ratio: float) -> int:
  """The cost that `cost of the groups before < threshold` compares with: ceil(ratio * total).

  Raises:
    ValueError: ratio outside 0..1.
  """
  try:
    ratio = float(ratio)
  except (TypeError, ValueError):
    raise ValueError(f"ratio: {ratio!r:.80}; a number in 0..1 is accepted") from None
  if not 0 <= ratio <= 1:
    raise ValueError(f"ratio: {ratio} is not in 0..1")
  exact = fractions.Fraction(ratio).limit_denominator(10**6)  # 0.1 means a tenth
  return math.ceil(exact * int(space.cost.sum()))
