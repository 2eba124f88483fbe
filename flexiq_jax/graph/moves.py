"""Orders of a variable's entries, and what follows from them for variables that it is made of.

An order is a `Moves`, or None where everything stays where it is. What cannot be ordered so raises
`Fixed`. See `graph.reorder`, which follows them through a model.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


class Fixed(ValueError):
  """An order that cannot be brought about; says where it stops."""


@dataclasses.dataclass(frozen=True)
class Moves:
  """Where the entries of a variable have to come from.

  Attributes:
    dims: dimensions of the variable along which entries move, ascending.
    source: int `[len(dims), *sizes]`, the position along each of `dims` that the entry at this
      place has in the unordered variable; -1 in all where nobody minds.
  """

  dims: tuple[int, ...]
  source: np.ndarray

  @property
  def trivial(self) -> bool:
    """Whether every entry stays, or may stay, where it is."""
    return bool(((self.source == np.indices(self.source.shape[1:])) | (self.source < 0)).all())

  def apply(self, values: np.ndarray) -> np.ndarray:
    """The entries of an array in this order."""
    source = np.where(self.source < 0, np.indices(self.source.shape[1:]), self.source)
    front = range(len(self.dims))
    moved = np.moveaxis(np.asarray(values), self.dims, front)[tuple(source)]
    return np.moveaxis(moved, front, self.dims)


Order = Moves | None  # None: everything stays where it is


def agreed(orders: Sequence[Order]) -> Order:
  """The one order that satisfies all readers of a variable."""
  moved = [o for o in orders if o is not None and not o.trivial]
  if not moved:
    return None
  kept = [o for o in orders if o is not None]
  if len(kept) < len(orders):
    raise Fixed("what would have to be in another order is read elsewhere, too")
  dims = tuple(sorted({d for o in kept for d in o.dims}))
  sizes = {d: n for o in kept for d, n in zip(o.dims, o.source.shape[1:], strict=True)}
  shape = [sizes.get(d, 1) for d in range(dims[-1] + 1)]
  spread = [widen(o, dims, shape).source for o in kept]
  joint = spread[0]
  for source in spread[1:]:
    if ((source != joint) & (source >= 0) & (joint >= 0)).any():
      raise Fixed("what would have to be in another order is read in a second one")
    joint = np.maximum(joint, source)
  return Moves(dims, joint)


def restrict(moves: Moves, to: Mapping[int, int]) -> Order:
  """The order of an operand that has some of the dimensions, `{own: the operand's}`.

  Raises:
    Fixed: entries would have to come from other places depending on a dimension it lacks.
  """
  if not to:
    return None
  own = [moves.dims.index(d) for d in sorted(to)]
  lost = tuple(k for k in range(len(moves.dims)) if k not in own)
  source = moves.source[own]
  if lost:
    axes = tuple(1 + k for k in lost)
    top = source.max(axis=axes, keepdims=True)
    if ((source != top) & (source >= 0)).any():
      raise Fixed("channels that are computed together, as those of a head, would have to part")
    source = top.squeeze(axes)
  dims = [to[d] for d in sorted(to)]
  by = np.argsort(dims)
  return Moves(tuple(sorted(dims)), source[by].transpose(0, *(1 + by)))


def widen(moves: Moves, dims: Sequence[int], shape: Sequence[int]) -> Moves:
  """The same order, told along more dimensions."""
  sizes = [shape[d] for d in dims]
  source = np.indices(sizes)
  at = [dims.index(d) for d in moves.dims]
  own = moves.source.reshape(len(at), *(shape[d] if d in moves.dims else 1 for d in dims))
  source[at] = own
  return Moves(tuple(dims), np.where((own < 0).any(axis=0), -1, source))


def row_major(source: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Positions `[len(sizes), ...]` -> row-major numbers, -1 where there is none."""
  flat = np.ravel_multi_index(tuple(np.maximum(source, 0)), tuple(sizes))
  return np.where((source < 0).any(axis=0), -1, flat)


def reshaped(first: Moves, before: Sequence[int], after: Sequence[int]) -> Order:
  """The order of a reshape's operand."""
  # Dimensions of one entry may have nothing on the other side.
  moves = restrict(first, {d: d for d in first.dims if after[d] > 1})
  if moves is None:
    return None
  moved = [run for run in runs(before, after) if not set(run[1]).isdisjoint(moves.dims)]
  new = tuple(d for run in moved for d in run[1])
  old = tuple(d for run in moved for d in run[0])
  moves = widen(moves, new, after)
  sources = []
  for ins, outs in moved:
    at = [new.index(d) for d in outs]
    flat = row_major(moves.source[at], [after[d] for d in outs])
    own = np.stack(np.unravel_index(np.maximum(flat, 0), [before[d] for d in ins]))
    sources.append(np.where(flat < 0, -1, own))
  return Moves(old, np.concatenate(sources).reshape(len(old), *(before[d] for d in old)))


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
  """Smallest runs of dimensions of two shapes that hold the same entries: `(before, after)`."""
  found: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(before) or j < len(after):
    ins, outs = [], []
    a = b = 1
    while not (ins or outs) or a != b:
      if (a <= b and i < len(before)) or j == len(after):
        a, i = a * before[i], i + 1
        ins.append(i - 1)
      else:
        b, j = b * after[j], j + 1
        outs.append(j - 1)
    found.append((ins, outs))
  return found


def placed(before: Sequence[int], windows: Sequence[tuple], orders: Sequence[Order]) -> Moves:
  """Joins the orders of parts of a variable."""
  cut = {d for window in windows for d, r in enumerate(window) if len(r) < before[d]}
  dims = tuple(sorted(cut.union(*(o.dims for o in orders if o is not None)))) or (0,)
  source = np.full((len(dims), *(before[d] for d in dims)), -1)
  for window, order in zip(windows, orders, strict=True):
    shape = {d: len(window[d]) for d in dims}
    own = order or Moves(dims, np.indices([shape[d] for d in dims]))
    own = widen(own, dims, [len(r) for r in window]).source
    steps = [np.asarray(window[d]) for d in dims]
    placed = [np.where(o < 0, -1, s[np.maximum(o, 0)]) for s, o in zip(steps, own, strict=True)]
    source[(slice(None), *np.ix_(*steps))] = np.stack(placed)
  return Moves(dims, source)
