"""Orders as keys: one real number per channel group; sorted by their keys the groups are an order.

Any T numbers are a valid order, and an order is a `Schedule`: it hits every budget, and its masks
are nested. So a search may cut and mix keys as it likes, and never has to repair what it made.

| symbol | meaning |
|---|---|
| T, L | channel groups of the model; layers, of J_l groups each |
| V | levels (4-bit ratios) scored at once; 1 where levels are searched one after the other |
| keys | float32 `[T]`; normalized keys are rank / T, so that keys of different orders compare |

Functions take one order; `jax.vmap(decode, (None, 0))` takes many.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.orders import Space, threshold

Array = Any
Order = Sequence[int] | np.ndarray

_LEAST = float(np.finfo(np.float32).tiny)  # in place of a score of 0, whose logarithm is -inf


@struct.dataclass
class Encoding:
  """What keys stand for: the channel groups, levels and frozen prefix of a search, as arrays.

  Attributes:
    layer: int32 `[T]`, the layer of each group.
    cost: int32 `[T]`, as in `Space`.
    log_score: float32 `[T]`, logarithm of the score per cost; finite for a score of 0, too.
    thresholds: int32 `[V]`, the budget of each level (`schedule.threshold`).
    fixed: float32 `[T]`, rank / T of a group that is frozen in front, inf for a free one.
    sizes: J_l of each layer.
  """

  layer: Array
  cost: Array
  log_score: Array
  thresholds: Array
  fixed: Array
  sizes: tuple[int, ...] = struct.field(pytree_node=False)

  @classmethod
  def create(
    cls,
    space: Space,
    scores: np.ndarray,
    ratios: Sequence[float],
    order: Order | None = None,
  ) -> "Encoding":
    """Encodes a search of a space.

    Args:
      space: the channel groups.
      scores: float `[T]`, error of each group alone. They guide a search and decide nothing.
      ratios: the V levels, each in 0..1.
      order: int `[F]`, the groups frozen in front, in this order: the prefix found at a lower
        level, `schedule.order[:schedule.prefix(lower)]`. None freezes nothing.

    Raises:
      ValueError: no ratio, or one outside 0..1; scores of the wrong length, negative or not finite;
        an order that repeats a group, has an unknown one, or reaches beyond the lowest ratio.
    """
    total, scores = space.total, np.asarray(scores, np.float64)
    if scores.shape != (total,):
      raise ValueError(f"scores: shape {scores.shape}, expected ({total},)")
    fine = np.isfinite(scores) & (scores >= 0)
    if not fine.all():
      raise ValueError(f"scores: {int((~fine).sum())} of them are negative or not finite")
    if not len(ratios):
      raise ValueError("ratios: there are none; expected at least one in 0..1")
    thresholds = [threshold(space, ratio) for ratio in ratios]
    frozen = np.asarray(() if order is None else order, np.int64)
    if len(np.unique(frozen)) < len(frozen) or not np.isin(frozen, np.arange(total)).all():
      raise ValueError(f"order: its entries are not different groups in 0..{total - 1}")
    if len(frozen) and space.cost[frozen[:-1]].sum() >= min(thresholds):
      raise ValueError(
        f"order: {len(frozen)} frozen groups reach beyond ratio {min(ratios)}; expected the prefix "
        "of a lower ratio"
      )
    fixed = np.full(total, np.inf, np.float32)
    fixed[frozen] = _grid(total)[: len(frozen)]
    return cls(
      layer=jnp.asarray(space.layer, jnp.int32),
      cost=jnp.asarray(space.cost, jnp.int32),
      log_score=jnp.asarray(np.log(np.maximum(scores / space.cost, _LEAST)), jnp.float32),
      thresholds=jnp.asarray(thresholds, jnp.int32),
      fixed=jnp.asarray(fixed),
      sizes=space.sizes,
    )

  @property
  def total(self) -> int:
    """T, the number of groups."""
    return len(self.layer)

  @property
  def frozen(self) -> Array:
    """Which groups are frozen in front, bool `[T]`."""
    return jnp.isfinite(self.fixed)


def read(encoding: Encoding, keys: Array) -> tuple[Array, Array]:
  """`normalize` and `decode` with a single sort.

  Args:
    encoding: of the space.
    keys: `[T]`, any numbers; those of frozen groups are not read.

  Returns:
    The normalized keys, float32 `[T]`, and the masks, bool `[V, T]`.
  """
  order = _order(encoding, keys)
  cost = encoding.cost[order]
  before = jnp.cumsum(cost, dtype=jnp.int32) - cost  # int32 holds the cost of all (see Space)
  length = jnp.sum(before[None] < encoding.thresholds[:, None], axis=1)
  rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
  return jnp.asarray(_grid(encoding.total))[rank], rank[None] < length[:, None]


def decode(encoding: Encoding, keys: Array) -> Array:
  """Which groups are in 4 bits at each level, bool `[V, T]`: `Schedule.mask` of `order_of`."""
  return read(encoding, keys)[1]


def normalize(encoding: Encoding, keys: Array) -> Array:
  """The same order with ranks / T for keys, float32 `[T]`; frozen groups get their `fixed`."""
  return read(encoding, keys)[0]


def order_of(encoding: Encoding, keys: Array) -> np.ndarray:
  """Keys `[T]` -> the order for a `Schedule`, int `[T]`: frozen groups, then by key, then flat."""
  return np.asarray(_order(encoding, jnp.asarray(keys)))


def keys_of(order: Order) -> np.ndarray:
  """An order, int `[T]` -> its normalized keys, float32 `[T]`.

  Raises:
    ValueError: `order` is not a permutation.
  """
  order = np.asarray(order)
  if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(len(order))):
    raise ValueError(f"order: shape {order.shape}, not a permutation of 0..{order.size - 1}")
  keys = np.empty(len(order), np.float32)
  keys[order] = _grid(len(order))
  return keys


def _order(encoding: Encoding, keys: Array) -> Array:
  groups = jnp.arange(encoding.total, dtype=jnp.int32)
  return jax.lax.sort((encoding.fixed, keys, groups), num_keys=3)[2]


def _grid(total: int) -> np.ndarray:
  """Rank -> rank / T. A table from NumPy, so that a rank has the same bits wherever it is made."""
  return np.arange(total, dtype=np.float32) / np.float32(total)
