"""Cuts a model at layers: what lies before a layer is computed once, what follows many times.

A search that changes one layer of many needs no more than the equations from that layer on. A cut
at a layer splits the model's flat jaxpr just before the layer's contraction. The *live* variables
cross it: the dynamic ones that are defined before it and that the result needs after it (of a
residual block the shortcut, too). Static variables never cross; each piece computes those that it
reads from the parameters again.

    x -- head --> Live at cut 0 -- step 0 --> Live at cut 1 -- step 1 --> ... --> y
                        `------------------------ tail 0 -----------------------> y
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import struct
from jax.extend.core import Literal

from flexiq_jax.graph.layer import Array, Layer
from flexiq_jax.graph.tracing import Apply, Rule, Traced, by_rule, closest, layers, trace


@struct.dataclass
class Live:
  """The activations that cross a cut: a pytree with `values` as leaves.

  Attributes:
    values: activations in the order in which the model computes them, in the model's own dtypes.
    at: name of the layer at which the model is cut; static.
    x: structure and `jax.ShapeDtypeStruct`s of the input that they come from; static. The rest of
      the model is traced by it, so the batch is chosen before the head and not after it.
  """

  values: tuple[Array, ...]
  at: str = struct.field(pytree_node=False)
  x: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]] = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
  """A model cut at layers (see `cut`); static.

  Its functions take any batch size, and jit, vmap and grad apply to them. Like `with_rule` they
  trace the model at each call, so wrap them in `jax.jit`.

  Head and tail run the equations of `with_rule(apply, rule)` on the same operands: the result is
  the same bit for bit when both are in one jit, or in none. Compiled apart, integer sums inside of
  layers stay exact, but XLA may fuse the floating point operations around a cut in another way; a
  last bit may then differ, and a quantizer may make the next code of it.

  Attributes:
    apply: pure function `(params, x) -> y`.
    names: layers at which it is cut, in execution order; cut i lies just before `names[i]`.
  """

  apply: Apply
  names: tuple[str, ...]

  def head(self, rule: Rule) -> Callable[[Any, Any], Live]:
    """`run(params, x) -> live`: everything before cut 0."""
    return self._run(0, 1, rule)

  def step(self, i: int, rule: Rule) -> Callable[[Any, Live], Any]:
    """`run(params, live) -> live`: from cut i to just before the next; the last returns y."""
    return self._run(self._bound(i), i + 2, rule)

  def tail(self, i: int, rule: Rule) -> Callable[[Any, Live], Any]:
    """`run(params, live) -> y`: layer `names[i]` and everything after it."""
    return self._run(self._bound(i), len(self.names) + 1, rule)

  def _bound(self, i: int) -> int:
    if not 0 <= i < len(self.names):
      raise ValueError(f"i: no cut {i}; expected 0..{len(self.names) - 1}")
    return i + 1

  def _run(self, start: int, stop: int, rule: Rule) -> Callable[[Any, Any], Any]:
    """Runs between two bounds: 0 is the input, i + 1 is cut i, the one after these the result."""

    def run(params, given):
      live = given if start else _enter(given)
      traced = trace(self.apply, params, jax.tree.unflatten(*live.x))
      number = {layer.name: i for i, layer in traced.layers.items()}
      jaxpr = traced.jaxpr.jaxpr
      bounds = [0, *(number[name] for name in self.names), len(jaxpr.eqns)]
      outs, tree = tuple(jaxpr.outvars), traced.out_tree
      if inner := stop <= len(self.names):
        _, outs = _piece(traced, bounds[stop], bounds[-1], outs, tree)
        tree = jax.tree.structure(outs)
      piece, crossing = _piece(traced, bounds[start], bounds[stop], outs, tree)
      inputs = jaxpr.invars[len(traced.paths) :]
      if start:
        _check(live, self.names[start - 1], crossing)
      known = dict(zip(crossing if start else inputs, live.values, strict=True))
      leaves = [*jax.tree.leaves(params), *itertools.repeat(None, len(inputs))]
      out = by_rule(piece, leaves, rule, known)
      return Live(out, self.names[stop - 1], live.x) if inner else out

    return run


def cut(apply: Apply, params: Any, x: Any, names: Sequence[str]) -> Segments:
  """Cuts a model at layers.

  Args:
    apply: pure function `(params, x) -> y`.
    params: pytree of arrays or `jax.ShapeDtypeStruct`s.
    x: example input(s) with a leading batch dimension, as for `layers`.
    names: layers at which to cut, in any order.

  Raises:
    ValueError: no names, a name twice or of no layer; see `layers` for the rest.
  """
  known = [layer.name for layer in layers(apply, params, x)]
  if not names:
    raise ValueError("names: no layer to cut at; expected at least one")
  for name in names:
    if name not in known:
      raise ValueError(f"names: no layer {name!r}; closest names: {closest(name, known)}")
  if len(set(names)) < len(names):
    raise ValueError(f"names: {max(names, key=list(names).count)!r} is there more than once")
  return Segments(apply=apply, names=tuple(sorted(names, key=known.index)))


def balanced(layers: Sequence[Layer], k: int) -> tuple[str, ...]:
  """Where to cut so that the pieces cost about the same; each tail costs a compilation.

  Args:
    layers: the layers between which to choose, in execution order.
    k: number of cuts.

  Returns:
    `[k]` layer names, the first layer's first. Of all choices this one has the least sum of squared
    MACs of the pieces (from a cut to the next or to the end, over the given layers).

  Raises:
    ValueError: `k` is not in 1..len(layers).
  """
  n = len(layers)
  if not 1 <= k <= n:
    raise ValueError(f"k: {k} cuts for {n} layers; expected 1..{n}")
  before = [0, *itertools.accumulate(layer.macs for layer in layers)]
  # best[a]: (sum of squares, cuts) of layers a.. in so many pieces; the last piece ends at n.
  best = {a: ((before[n] - before[a]) ** 2, (a,)) for a in range(n)}
  for pieces in range(2, k + 1):
    best = {
      a: min(
        ((before[b] - before[a]) ** 2 + best[b][0], (a, *best[b][1]))
        for b in range(a + 1, n - pieces + 2)
      )
      for a in range(n - pieces + 1)
    }
  return tuple(layers[a].name for a in best[0][1])


def _piece(
  traced: Traced, start: int, stop: int, outs: Sequence[Any], tree: Any
) -> tuple[Traced, tuple[Any, ...]]:
  """Equations `start` to before `stop`, as far as `outs` need them, as a model of their own.

  Returns:
    (that model with the results `outs` in the structure `tree`, and with the earlier static
    equations that it needs; the dynamic variables from before `start` that it reads, in the order
    of their definition).
  """
  jaxpr = traced.jaxpr.jaxpr
  needed = set(_variables(outs))
  kept = []
  for i in reversed(range(stop)):
    eqn = jaxpr.eqns[i]
    mine = i >= start or traced.static.issuperset(eqn.outvars)
    if mine and not needed.isdisjoint(eqn.outvars):
      kept.insert(0, i)
      needed.update(_variables(eqn.invars))
  before = [*jaxpr.invars, *(v for eqn in jaxpr.eqns[:start] for v in eqn.outvars)]
  eqns = [jaxpr.eqns[i] for i in kept]
  pick = lambda table: {n: table[i] for n, i in enumerate(kept) if i in table}
  piece = dataclasses.replace(
    traced,
    jaxpr=traced.jaxpr.replace(jaxpr=jaxpr.replace(eqns=eqns, outvars=list(outs))),
    layers=pick(traced.layers),
    sides=pick(traced.sides),
    out_tree=tree,
  )
  return piece, tuple(v for v in before if v in needed and v not in traced.static)


def _variables(operands: Sequence[Any]) -> list[Any]:
  return [v for v in operands if not isinstance(v, Literal)]


def _enter(x: Any) -> Live:
  """The model's input as what crosses its beginning."""
  spec, tree = jax.tree.flatten(jax.eval_shape(lambda x: x, x))
  return Live(tuple(jax.tree.leaves(x)), "", (tree, tuple(spec)))


def _check(live: Live, name: str, crossing: Sequence[Any]) -> None:
  """Refuses what does not belong to a cut."""
  if live.at != name:
    raise ValueError(f"live: of the cut at layer {live.at}, expected that at {name}")
  given, expected = (
    [f"{a.dtype}{list(a.shape)}" for a in arrays]
    for arrays in (live.values, [v.aval for v in crossing])
  )
  if given != expected:
    raise ValueError(
      f"live: {', '.join(given)} at layer {name}, expected {', '.join(expected)}; choose the batch "
      "before the head, not after it"
    )
