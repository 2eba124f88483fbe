"""A quadratic model of the distance to the 8-bit network, and its minimum by simulated annealing.

A channel group g that changes sides moves the logits by d_g. If effects add, then with the residual
r of a base mask and the flips s of another mask from it the distance is

    |r + sum_g s_g d_g|^2 = value + 2 gradient . s + s' gram s,  gradient_g = r . d_g,  gram = d' d

CLADO (arXiv 2307.05657) measures such a matrix for layers and solves an integer program; here it is
of channel groups. A prediction costs microseconds, so thousands of masks are tried for the price of
one forward pass.

| symbol | meaning |
|---|---|
| T, C | channel groups; chains of the annealing |
| s | flips, bool `[T]`: the groups that are on another side than in the base |

A mask is *reachable* at a ratio if an order exists whose `Schedule` has it there: it reaches the
ratio, and without its last group, which may be its most expensive one, it would not.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexiq_jax.orders import Space, threshold
from flexiq_jax.search.gram import annealing

Array = Any


@dataclasses.dataclass(frozen=True)
class Quadratic:
  """Predicted distance of masks. NumPy arrays on the host.

  Attributes:
    base: bool `[T]`, the mask in whose neighbourhood the model holds.
    value: the distance at `base`.
    gradient: float64 `[T]`, r . d_g; effects are those of *leaving* the base, so a group has the
      sign of its flip.
    gram: float64 `[T, T]`, symmetric.

  Raises:
    ValueError: shapes that do not fit, a `base` that is not bool, numbers that are not finite, a
      `gram` that is not symmetric (up to float32's rounding).
  """

  base: np.ndarray
  value: float
  gradient: np.ndarray
  gram: np.ndarray

  def __post_init__(self):
    total = np.size(self.base)
    _check_flags("base", self.base, total)
    for field, shape in (("value", ()), ("gradient", (total,)), ("gram", (total, total))):
      array = getattr(self, field)
      if np.shape(array) != shape:
        raise ValueError(f"{field}: shape {np.shape(array)}, expected {shape}")
      if not np.isfinite(array).all():
        raise ValueError(f"{field}: not all finite")
    skew = np.abs(self.gram - self.gram.T).max(initial=0)
    if skew > 1e-4 * np.abs(self.gram).max(initial=0):
      raise ValueError(f"gram: differs from its transpose by {skew}; expected a symmetric matrix")

  def predict(self, masks: np.ndarray) -> np.ndarray:
    """Masks, bool `[..., T]` -> predicted distances, float64 `[...]`."""
    s = np.not_equal(masks, self.base).astype(np.float64)
    return self.value + 2 * (s @ self.gradient) + ((s @ self.gram) * s).sum(axis=-1)

  def moved(self, base: np.ndarray) -> "Quadratic":
    """The same model around another base, bool `[T]`; predictions stay.

    A group that changed sides leaves the new base in the opposite direction.
    """
    _check_flags("base", base, len(self.base))
    s = base != self.base
    sign = np.where(s, -1.0, 1.0)
    return Quadratic(
      base=base,
      value=float(self.predict(base)),
      gradient=sign * (self.gradient + self.gram @ s),
      gram=self.gram * sign[:, None] * sign[None],
    )

  def toward_diagonal(self, share: float) -> "Quadratic":
    """Shrinks how groups act on each other: `gram` off its diagonal times 1 - share (0..1)."""
    if not 0 <= share <= 1:
      raise ValueError(f"share: {share} is not in 0..1")
    gram = self.gram * (1 - share)
    np.fill_diagonal(gram, np.diag(self.gram))
    return dataclasses.replace(self, gram=gram)


def ledoit_wolf(gram_mean: np.ndarray, squares_mean: np.ndarray, count: int) -> float:
  """How far to shrink a sampled matrix toward its diagonal.

  The least expected squared error is at the noise's share of the energy off the diagonal. Without
  shrinkage a minimum over many masks is one of the noise. Ledoit & Wolf, "A well-conditioned
  estimator for large-dimensional covariance matrices" (2004), with the diagonal for a target.

  Args:
    gram_mean: `[T, T]`, the mean of the samples' matrices a_i (a sample is an example).
    squares_mean: `[T, T]`, the mean of a_i * a_i, elementwise.
    count: number of samples.

  Returns:
    In 0..1, for `Quadratic.toward_diagonal`.

  Raises:
    ValueError: fewer than two samples, which show no variance; shapes that differ.
  """
  if count < 2:
    raise ValueError(f"count: {count} samples; expected at least 2")
  if np.shape(squares_mean) != np.shape(gram_mean):
    raise ValueError(
      f"squares_mean: shape {np.shape(squares_mean)}, expected {np.shape(gram_mean)}"
    )

  def off_diagonal(a: np.ndarray) -> float:
    return float(a.sum() - np.trace(a))

  energy = np.square(gram_mean, dtype=np.float64)
  noise = off_diagonal(np.maximum(squares_mean - energy, 0)) / count
  return min(1.0, noise / max(off_diagonal(energy), float(np.finfo(np.float64).tiny)))


def fill(quadratic: Quadratic, space: Space, ratio: float, inside: np.ndarray) -> np.ndarray:
  """Completes a mask to a ratio, greedily on the model.

  Args:
    quadratic: the model.
    space: the channel groups.
    ratio: in 0..1.
    inside: bool `[T]`, groups that are in 4 bits already.

  Returns:
    int, the groups that join, in this order: each time the one of least predicted increase per
    cost. Empty where `inside` reaches the ratio.
  """
  _check_flags("inside", inside, space.total)
  missing, order = threshold(space, ratio) - int(space.cost[inside].sum()), []
  steps = _greedy(quadratic, space, inside, [~inside])
  while missing > 0:
    order.append(next(steps))
    missing -= int(space.cost[order[-1]])
  return np.array(order, np.int64)


def arrange(
  quadratic: Quadratic, space: Space, masks: Sequence[np.ndarray], ratios: Sequence[float]
) -> np.ndarray:
  """An order whose schedule has the given masks at the given ratios.

  What a level adds to the one below it is ordered greedily, by predicted increase per cost, and so
  is the rest after the last level. A level must end with a group without which it falls short: of
  these with the one that greedy takes last.

  Args:
    quadratic: the model.
    space: the channel groups.
    masks: bool `[T]` for each level, each inside the next one.
    ratios: in 0..1 for each level, ascending.

  Returns:
    int `[T]`, with `Schedule(space, order).mask(ratios[v]) == masks[v]`.

  Raises:
    ValueError: masks or ratios that do not ascend, a mask that is not reachable.
  """
  if len(masks) != len(ratios) or any(np.diff(ratios) < 0):
    raise ValueError(f"ratios: {list(ratios)} for {len(masks)} masks; expected as many, ascending")
  nothing, everything = np.zeros(space.total, bool), np.ones(space.total, bool)
  segments, spares, below = [], [], nothing
  for level, (mask, ratio) in enumerate(zip(masks, ratios, strict=True)):
    _check_flags(f"masks[{level}]", mask, space.total)
    if np.any(below & ~mask):
      raise ValueError(f"masks[{level}]: lacks {np.sum(below & ~mask)} groups of the level below")
    segments.append(mask & ~below)
    spares.append(_spare(f"masks[{level}]", space, ratio, mask, segments[-1]))
    below = mask
  segments, spares = [*segments, everything & ~below], [*spares, -1]
  order = np.array(list(_greedy(quadratic, space, nothing, segments)), np.int64)
  pieces = np.split(order, np.cumsum([np.sum(segment) for segment in segments])[:-1])
  for piece, spare in zip(pieces, spares, strict=True):
    last = np.flatnonzero(space.cost[piece] > spare)[-1:]
    piece[:] = np.concatenate([np.delete(piece, last), piece[last]])
  return np.concatenate(pieces)


def anneal(
  key: Array,
  quadratic: Quadratic,
  space: Space,
  ratio: float,
  *,
  frozen: np.ndarray,
  start: np.ndarray,
  limits: Sequence[int],
  steps: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Reachable masks of small predicted distance, by simulated annealing (annealing.py).

  Another ratio, key, model or choice of frozen groups compiles nothing anew.

  Args:
    key: typed random key, which decides the result.
    quadratic: the model.
    space: the channel groups.
    ratio: in 0..1.
    frozen: bool `[T]`, groups that stay on the side that they have in `start`.
    start: bool `[T]`, a reachable mask; its last group is not a frozen one.
    limits: for each chain how many groups may be on another side than in the base: how far from it
      the model is trusted. T is no limit.
    steps: length of a chain; None is 40 T, in 20,000..200,000, and 400 T below 50 groups.

  Returns:
    The best mask of each chain, bool `[C, T]`, and their predicted distances, float64 `[C]`, none
    above that of `start`.

  Raises:
    ValueError: arrays that do not fit, a start that is not reachable, no steps, no limits, or one
      that `start` violates.
  """
  for name, flags in (("base", quadratic.base), ("frozen", frozen), ("start", start)):
    _check_flags(name, flags, space.total)
  _spare("start", space, ratio, start, start & ~frozen)
  flips = start != quadratic.base
  if min(limits, default=-1) < flips.sum():
    raise ValueError(
      f"limits: {list(limits)}; expected at least one, and none below {flips.sum()}, the groups "
      "that differ between start and base"
    )
  if steps is None:
    total = space.total
    steps = min(max(40 * total, min(20_000, 400 * total)), 200_000)
  if steps < 1:
    raise ValueError(f"steps: {steps}; expected at least 1")

  # The order of annealing's slots, from "still inside" to "frozen".
  segment = np.where(quadratic.base, np.where(start, 0, 1), np.where(start, 2, 3))
  segment[frozen] = 4
  lo, mid, hi, end = np.cumsum(np.bincount(segment, minlength=5))[:4]
  h = quadratic.gradient + quadratic.gram @ flips
  scale = max(np.abs(h).max(), np.abs(quadratic.gram).max()) or 1.0
  model = annealing.Model(
    gram=jnp.asarray(quadratic.gram / scale, jnp.float32),
    cost=jnp.asarray(space.cost, jnp.int32),
    threshold=jnp.int32(threshold(space, ratio)),
    mid=jnp.int32(mid),
    end=jnp.int32(end),
  )
  chain = annealing.Chain(
    slots=jnp.asarray(np.argsort(segment, kind="stable"), jnp.int32),
    lo=jnp.int32(lo),
    hi=jnp.int32(hi),
    h=jnp.asarray(h / scale, jnp.float32),
    cost=jnp.int32(space.cost[start].sum()),
    gain=jnp.float32(0),
  )
  free = np.minimum(limits, space.total) - np.sum(flips & frozen)
  best = annealing.run(key, model, chain, jnp.asarray(free, jnp.int32), steps=steps)

  slots, lo, hi = (np.asarray(a) for a in best)
  slot = np.arange(space.total)[None]
  inside = (slot < lo[:, None]) | ((slot >= mid) & (slot < hi[:, None]))
  masks = np.empty(slots.shape, bool)
  np.put_along_axis(masks, slots, inside, axis=1)
  masks[:, frozen] = start[frozen]
  masks = np.where((quadratic.predict(masks) > quadratic.predict(start))[:, None], start, masks)
  return masks, quadratic.predict(masks)


def _greedy(
  quadratic: Quadratic, space: Space, inside: np.ndarray, segments: Sequence[np.ndarray]
) -> Iterator[int]:
  """Yields the groups of each segment, next the one whose entry adds least per cost."""
  at = quadratic.moved(inside)
  gradient, alone = at.gradient.copy(), np.diag(at.gram)
  for segment in segments:
    left = segment.copy()
    while left.any():
      group = int(np.argmin(np.where(left, (2 * gradient + alone) / space.cost, np.inf)))
      yield group
      left[group] = False
      gradient += at.gram[group]


def _spare(name: str, space: Space, ratio: float, mask: np.ndarray, last: np.ndarray) -> int:
  """Cost of a mask over that of its ratio; one of the groups `last` must cost more, if any."""
  spare = int(space.cost[mask].sum()) - threshold(space, ratio)
  if spare < 0:
    raise ValueError(f"{name}: falls short of ratio {ratio} by a cost of {-spare}")
  if last.any() and space.cost[last].max() <= spare:
    raise ValueError(
      f"{name}: over ratio {ratio} by a cost of {spare}, at least one whole group; expected a mask "
      "that reaches it with its last group"
    )
  return spare


def _check_flags(name: str, flags: np.ndarray, total: int) -> None:
  if not isinstance(flags, np.ndarray):
    raise ValueError(f"{name}: {type(flags).__name__}, expected a NumPy array")
  if flags.shape != (total,) or flags.dtype != bool:
    raise ValueError(f"{name}: {flags.dtype} of shape {flags.shape}, expected bool of ({total},)")
