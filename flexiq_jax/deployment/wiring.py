"""What of a deployed model is no array: the model's code, and which layer feeds which."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from flexiq_jax import graph
from flexiq_jax.deployment import depthwise, links, patches
from flexiq_jax.graph import tracing

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
  """The static side of a deployed model.

  Attributes:
    apply: the float model with batch norm folded, `(params, x) -> y`.
    params: its parameters, shapes alone.
    feeds: layer name -> the layer that emits its codes, or why there is none.
    between: depthwise layers that emit the codes of a layer that runs on the mixed matmul.
    dynamic: whether activation shifts are chosen at run time.
    folds: layer name -> the layers that write in its order, through what lies between; their
      results stay real numbers (see `graph.reorder`).
  """

  apply: graph.Apply
  params: Any
  feeds: Mapping[str, links.Feed]
  between: frozenset[str]
  dynamic: bool = False
  folds: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def wire(
  apply: graph.Apply,
  params: Any,
  x: Any,
  low: set[str],
  *,
  link: bool = True,
  dynamic: bool = False,
) -> Wiring:
  """Finds the links of a model; needs no parameter values.

  Args:
    apply: the float model with batch norm folded.
    params: its parameters or their shapes.
    x: example input(s).
    low: names of the layers that have a 4-bit side.
    link: whether layers may emit each other's codes.
    dynamic: whether activation shifts are chosen at run time.
  """
  params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  traced = tracing.trace(apply, params, x)
  tails, mixed = links.tails(traced), mixed_layers(traced, low)
  candidates = {
    layer.name
    for layer in traced.layers.values()
    if link and layer.name not in low and depthwise.supported(layer)
  }
  feeds = links.feeds(traced, tails, {*mixed, *candidates})
  between = candidates.intersection(feeds[name].producer for name in mixed)
  feeds = links.feeds(traced, tails, {*mixed, *between})
  for name, feed in feeds.items():
    if name not in mixed and name not in between:
      kind = "grouped or depthwise" if name in low else "8-bit at every level"
      feeds[name] = links.Feed(producer=None, reason=f"runs without a kernel: {kind}")
    elif not link and feed.producer:
      feeds[name] = links.Feed(producer=None, reason="links are turned off")
  return Wiring(
    apply=apply, params=params, feeds=feeds, between=frozenset(between), dynamic=dynamic
  )


def mixed_layers(traced: tracing.Traced, low: set[str]) -> dict[str, graph.Layer]:
  """The layers that run on the mixed matmul; `low` have a 4-bit side."""
  eqns = traced.jaxpr.jaxpr.eqns
  return {
    layer.name: layer
    for i, layer in traced.layers.items()
    if layer.name in low and patches.supported(layer, eqns[i])
  }


def fold_shapes(apply: graph.Apply, params: Any, x: Any) -> tuple[graph.Apply, Any]:
  """`graph.fold_batch_norm` without values: the folded model and the shapes of its parameters.

  Args:
    apply: the float model.
    params: its parameters or their shapes.
    x: example input(s).
  """
  found = []

  def fold(params):
    folded, values = graph.fold_batch_norm(apply, params, x)
    found.append(folded)
    return values

  shapes = jax.eval_shape(fold, params)
  return found[0], shapes
