"""Which part of which parameter a layer's weights are, and what the layer is called.

One parameter may hold the weights of several layers: of a stack of blocks, `blocks/fc1/kernel [L,
in, out]` and `kernel[i]`, or of projections beside each other, `qkv[:, :n]`. A static variable that
is such a piece of a parameter is a *view* of it. It is followed through slices, and what only moves
entries; a piece that is cut out in another way is told from others by its number alone.

| piece | weights of the layer | its name |
|---|---|---|
| `blocks/fc1/kernel[3]` | `blocks/3/fc1/kernel` | `blocks/3/fc1` |
| `w[3]` | `w/3` | `w/3` |
| `attn/qkv[:, 8:16]` | `attn/8:16/qkv` | `attn/8:16` |

The index of a stack stands after the longest path that all of it has in common.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from flexiq_jax.graph.describe import layer_names
from flexiq_jax.graph.moves import runs
from flexiq_jax.graph.origins import aval, needed

_SAME = ("convert_element_type", "copy")
_PIECES = ("dynamic_slice", "gather", "slice", "split")


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of a parameter.

  Attributes:
    leaf: number of the parameter.
    index: numbers that a stack was indexed with, as `("3",)`.
    rest: what else tells the piece from others, as `("8:16",)`.
  """

  leaf: int
  index: tuple[str, ...] = ()
  rest: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _View:
  """A variable whose entries are some of a parameter's, unchanged.

  Attributes:
    leaf: number of the parameter.
    dims: for each dimension the parameter's, and how many of its entries one step goes on; None
      where that is not one dimension.
    start: dimension of the parameter -> its first entry, where not all are there.
  """

  leaf: int
  dims: tuple[tuple[int, int] | None, ...]
  start: tuple[tuple[int, int], ...] = ()

  def part(self, shape: Sequence[int]) -> Part:
    """What a view of this shape is called."""
    index, rest = [], []
    for axis, start in self.start:
      free = [
        (d[1], n) for d, n in zip(self.dims, shape, strict=True) if d and d[0] == axis and n > 1
      ]
      if not free:
        index.append(str(start))
        continue
      step, stop = min(free)[0], start + 1 + sum(by * (n - 1) for by, n in free)
      rest.append(f"{start}:{stop}" + (f":{step}" if step > 1 else ""))
    return Part(self.leaf, tuple(index), tuple(rest))


def parts(
  jaxpr: Jaxpr, leaves: int, static: Collection[Any]
) -> tuple[dict[Any, frozenset[Part]], Collection[Any]]:
  """What static variables are made of.

  Args:
    jaxpr: flat; its first inputs are the parameters.
    leaves: number of parameters.
    static: variables that depend on parameters and constants alone.

  Returns:
    Variable -> the parts of parameters that it is made of; the variables that are such a part, and
    not computed from any.
  """
  views = {
    v: _View(j, tuple((d, 1) for d in range(aval(v).ndim)))
    for j, v in enumerate(jaxpr.invars[:leaves])
  }
  found = {v: frozenset([Part(j)]) for j, v in enumerate(jaxpr.invars[:leaves])}
  numbers = itertools.count()
  for eqn in jaxpr.eqns:
    if eqn.outvars[0] not in static:
      continue
    name = eqn.primitive.name
    operands = [v for v in eqn.invars if not isinstance(v, Literal)]
    made_of = frozenset().union(*(found.get(v, ()) for v in operands))
    view = views.get(operands[0]) if operands else None
    seen = _looks(eqn, view) if view else [None] * len(eqn.outvars)
    for v, looked in zip(eqn.outvars, seen, strict=True):
      if looked:
        views[v], found[v] = looked, frozenset([looked.part(aval(v).shape)])
      elif name in _PIECES:
        mark = f"part {next(numbers)}"
        found[v] = frozenset(dataclasses.replace(p, rest=(*p.rest, mark)) for p in made_of)
      else:
        found[v] = made_of
  return found, views.keys()


def names(
  jaxpr: Jaxpr,
  used: Sequence[Part],
  found: Mapping[Any, frozenset[Part]],
  paths: Sequence[str],
) -> list[tuple[str, str]]:
  """Name of each layer and path of its weights; the second layer of one part is told by `:2`.

  Args:
    jaxpr: flat; its first inputs are the parameters.
    used: the part that each layer's weights come from.
    found: of all variables.
    paths: of the parameters.

  Raises:
    ValueError: two would be called the same.
  """
  alive = needed(jaxpr, {})
  read = {j for j, v in enumerate(jaxpr.invars[: len(paths)]) if v in alive}
  own = _own_paths(used, found, paths, read)
  called = layer_names([*own.values()])
  count: collections.Counter[Part] = collections.Counter()
  own_names = []
  for part in used:
    count[part] += 1
    path, name = own[part], called[own[part]]
    if count[part] > 1:
      again, (module, _, last) = f":{count[part]}", path.rpartition("/")
      whole = name in (path, path.removeprefix("params/"))
      path = path + again if whole else f"{module}{again}/{last}"
      name += again
    own_names.append((name, path))
  if twice := [name for name, n in collections.Counter(n for n, _ in own_names).items() if n > 1]:
    raise ValueError(f"params: several layers would be called {twice[0]!r}; rename one of them")
  return own_names


def shared(used: Mapping[str, Part], kept: Mapping[Part, str]) -> dict[str, str]:
  """Layer name -> the first other layer with the same weights, or what else reads them.

  Args:
    used: layer name -> the part that its weights are.
    kept: part that is also read as it is -> its path.
  """
  users = collections.defaultdict(list)
  for name, part in used.items():
    users[part].append(name)
  others = {name: [n for n in users[part] if n != name] for name, part in used.items()}
  same = {name: names[0] if names else kept.get(used[name]) for name, names in others.items()}
  return {name: other for name, other in same.items() if other}


def _own_paths(
  used: Iterable[Part], found: Mapping[Any, frozenset[Part]], paths: Sequence[str], read: set[int]
) -> dict[Part, str]:
  """A path of its own for each part that is a layer's weights.

  Args:
    used: the parts, in the order of their layers.
    found: of all variables.
    paths: of the parameters.
    read: numbers of the parameters that the model reads.
  """
  of_leaf = collections.defaultdict(dict)
  for part in used:
    of_leaf[part.leaf][part] = None
  # How many indices the parameters have that are stacks.
  depth = {path: 0 for j, path in enumerate(paths) if j in read}
  for part in set().union(*found.values()):
    if part.leaf in read:
      depth[paths[part.leaf]] = max(depth[paths[part.leaf]], len(part.index))
  named = {}
  for leaf, pieces in of_leaf.items():
    for number, part in enumerate(pieces):
      rest = (str(number),) if any(r.startswith("part ") for r in part.rest) else part.rest
      named[part] = paths[leaf] if len(pieces) == 1 else _path(paths[leaf], part.index, rest, depth)
  return named


def _path(path: str, index: Sequence[str], rest: Sequence[str], depth: Mapping[str, int]) -> str:
  """The path of a part."""
  keys = path.split("/")
  at = len(keys) if index or len(keys) == 1 else len(keys) - 1
  first = 2 if keys[0] == "params" else 1  # Linen's collection is no module
  for stop in range(first, len(keys)) if index else ():
    under = "/".join(keys[:stop]) + "/"
    if {n for other, n in depth.items() if other.startswith(under)} == {depth[path]}:
      at = stop
      break
  last = max(at, len(keys) - 1)
  return "/".join([*keys[:at], *index, *keys[at:last], *rest, *keys[last:]])


def _looks(eqn: JaxprEqn, view: _View) -> list[_View | None]:
  """The results of an equation as views, its first operand being one."""
  name, p = eqn.primitive.name, eqn.params
  before, after = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
  if name in _SAME:
    return [view]
  if name == "transpose":
    return [dataclasses.replace(view, dims=tuple(view.dims[d] for d in p["permutation"]))]
  if name == "squeeze":
    kept = (d for d in range(len(before)) if d not in p["dimensions"])
    return [dataclasses.replace(view, dims=tuple(view.dims[d] for d in kept))]
  if name == "reshape" and p["dimensions"] is None:
    return [_reshaped(view, before, after)]
  if name == "slice":
    return [_cut(view, before, p["start_indices"], p["limit_indices"], p["strides"])]
  if name == "split":
    ends, looks = itertools.accumulate(p["sizes"]), []
    for size, end in zip(p["sizes"], ends, strict=True):
      starts, limits = [0] * len(before), list(before)
      starts[p["axis"]], limits[p["axis"]] = end - size, end
      looks.append(_cut(view, before, starts, limits, None))
    return looks
  return [None] * len(eqn.outvars)


def _cut(view: _View, before, starts, limits, strides) -> _View | None:
  """A slice of a view."""
  dims, start = list(view.dims), dict(view.start)
  for d, (a, b, s) in enumerate(zip(starts, limits, strides or [1] * len(dims), strict=True)):
    if (a, b, s) == (0, before[d], 1):
      continue
    if (whole := dims[d]) is None:
      return None
    axis, by = whole
    start[axis] = start.get(axis, 0) + a * by
    dims[d] = (axis, by * s)
  return dataclasses.replace(view, dims=tuple(dims), start=tuple(sorted(start.items())))


def _reshaped(view: _View, before: Sequence[int], after: Sequence[int]) -> _View | None:
  """A reshape of a view; None where it hides what was cut."""
  dims: list[tuple[int, int] | None] = [None] * len(after)
  cut = {axis for axis, _ in view.start}
  for ins, outs in runs(before, after):
    wide = [view.dims[d] for d in ins if before[d] > 1]
    if len(wide) == 1 and wide[0]:
      axis, by = wide[0]
      for d in outs:
        dims[d] = (axis, by * math.prod(after[e] for e in outs if e > d))
    elif any(d is None or d[0] in cut for d in wide):
      return None
  return dataclasses.replace(view, dims=tuple(dims))
