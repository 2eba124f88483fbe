"""From an adaptive model to a deployed one: orders, packed weights, corrections of every level."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.deployment import depthwise, layouts, links, patches
from flexiq_jax.deployment.depthwise import Depthwise
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.deployment.model import Deployed
from flexiq_jax.deployment.wiring import mixed_layers, wire
from flexiq_jax.graph import Layer, reorder, tracing
from flexiq_jax.kernels import Window
from flexiq_jax.kernels.tpu import LANES, window_rows
from flexiq_jax.orders import LEVELS
from flexiq_jax.quant import QLayer

Array = Any


def deploy(
  model: AdaptiveModel,
  x: Any,
  *,
  levels: Sequence[float] = LEVELS,
  link: bool = True,
  granule: int = 2,
) -> Deployed:
  """Packs an adaptive model for the mixed matmul.

  Args:
    model: the model; kernels need one whose groups were lowered with shift blocks.
    x: example input(s) with a leading batch dimension (arrays or `jax.ShapeDtypeStruct`s).
    levels: ratios at which it is to run.
    link: fold channel orders into the layers before and let these emit codes; False gathers
      channels that the model itself does not have in order, which `deployed_rule` needs.
    granule: rows of K that a shift block is a multiple of: even for the reference, 128 for TPUs,
      where windows then slide over pixels.

  Raises:
    ValueError: the levels do not ascend within 0..1, or see `layouts.lay_out` and `layouts.pack`.
  """
  levels = tuple(float(r) for r in levels)
  if not levels or list(levels) != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= 1:
    raise ValueError(f"levels: {levels}; ascending numbers in 0..1 are accepted")
  network, low = model.network, {n: q.low for n, q in model.model.items() if q.low is not None}
  wiring = wire(network.apply, network.params, x, {*low}, link=link, dynamic=model.dynamic)
  traced = tracing.trace(network.apply, wiring.params, x)
  leaves = jax.tree.leaves(network.params)
  tails, values = links.tails(traced), tracing.static_values(traced, leaves)
  orders = model.schedule.layer_order()
  counts = [model.schedule.boundaries(r) for r in levels]
  windows = patches.windows(traced) if granule % LANES == 0 else {}
  laid = {
    name: layouts.lay_out(layer, low[name], orders[name], granule, slides(windows.get(name)))
    for name, layer in mixed_layers(traced, {*low}).items()
  }
  consumers = {f.producer: name for name, f in wiring.feeds.items() if f.producer}
  linked = {name for name, feed in wiring.feeds.items() if feed.producer}
  changes = _fold(traced, laid, linked, {*consumers}) if link else {}
  folds = {name: tuple(change.outputs) for name, change in changes.items()}
  folded = {name: order for change in changes.values() for name, order in change.outputs.items()}
  moved = {path: moves for change in changes.values() for path, moves in change.params.items()}
  wiring = dataclasses.replace(wiring, folds=folds)

  def outputs(name: str) -> np.ndarray | None:
    """The order of a layer's output channels: that of the layer it feeds, directly or not."""
    consumer = consumers.get(name)
    if consumer is None:
      return folded.get(name)
    return laid[consumer].order if consumer in laid else outputs(consumer)

  made: dict[str, Mixed | Plain | Depthwise] = {}
  for layer in traced.layers.values():
    name, q, tail = layer.name, model.model[layer.name], tails[layer.name]
    order, own = outputs(name), [c[name] for c in counts] if name in low else []
    if name not in laid and name not in wiring.between:
      made[name] = _plain(q, orders.get(name), own)
      continue
    bias = None if tail.bias is None else np.asarray(values[tail.bias], np.float32).reshape(-1)
    shared: dict[str, Any] = {
      # Multiplied as the rules do, by the same product.
      "scale": _picked(np.asarray(q.w_scale * q.x_scale, np.float32), order),
      "bias": None if bias is None else _picked(bias, order),
      "activation": tail.activation,
      "feeds": consumers.get(name, ""),
    }
    if name in wiring.between:
      assert order is not None
      gathered = None if name in linked else jnp.asarray(order)
      made[name] = Depthwise(q=depthwise.pack(layer, q, order), order=gathered, **shared)
      continue
    lay = laid[name]
    made[name] = Mixed(
      weights=layouts.pack(layer, q, lay, order),
      x_scale=jnp.asarray(q.x_scale, jnp.float32),
      order=None if name in {*linked, *folds} or _natural(lay, layer) else jnp.asarray(lay.order),
      places=jnp.asarray(lay.places[own], jnp.int32),
      correction=jnp.asarray(layouts.corrections(layer, q, lay, own, order, model.dynamic)),
      channels=lay.channels,
      signed=q.signed,
      **shared,
    )
  by_path = dict(zip(traced.paths, leaves, strict=True))
  ends = {name: tails[name] for name in made if not isinstance(made[name], Plain)}
  by_path.update((path, jnp.asarray(moves.apply(by_path[path]))) for path, moves in moved.items())
  floats = {path: by_path[path] for path in _still_read(traced, ends)}
  return Deployed(made, floats, jnp.asarray(levels, jnp.float32), wiring)


def _fold(
  traced: tracing.Traced,
  laid: Mapping[str, layouts.Layout],
  linked: set[str],
  producers: set[str],
) -> dict[str, reorder.Change]:
  """Folds orders into layers that feed others through more operations than their own tails.

  Args:
    traced: the model.
    laid: layer name -> layout.
    linked: layers that take the codes of another layer.
    producers: layers that emit codes.

  Returns:
    Layer name -> what changes elsewhere because of its order.
  """
  changes: dict[str, reorder.Change] = {}
  taken = set(producers)
  for name, layout in laid.items():
    if name in linked or not np.array_equal(np.sort(layout.order), np.arange(len(layout.order))):
      continue  # what lies between the layers knows no padding and no copies
    try:
      change = reorder.reorder(traced, name, layout.order)
    except reorder.Fixed:
      continue
    wanted = {*change.outputs, *change.params}
    if change.outputs and {*change.outputs} <= {*laid} and taken.isdisjoint(wanted):
      changes[name] = change
      taken |= wanted
  return changes


def _natural(layout: layouts.Layout, layer: Layer) -> bool:
  """Whether the model itself has a layer's channels in order."""
  return np.array_equal(layout.order, np.arange(layer.in_channels))


def slides(window: Window | None) -> bool:
  """Whether the TPU kernel can slide a layer's window: whether its images fit tiles."""
  if window is None:
    return False
  try:
    return window_rows(window) > 0
  except NotImplementedError:
    return False


def _picked(values: np.ndarray, order: np.ndarray | None) -> Array:
  """Values of outputs `[N]` in another order, zeros for its padding."""
  return jnp.asarray(values if order is None else np.where(order < 0, 0, values[order]))


def _plain(q: QLayer, order: np.ndarray | None, counts: Sequence[int]) -> Plain:
  """A layer without a kernel."""
  if order is None:
    return Plain(q)
  masks = np.zeros((len(counts), len(order)), bool)
  for row, count in zip(masks, counts, strict=True):
    row[order[:count]] = True
  return Plain(q, jnp.asarray(masks))


def _still_read(traced: tracing.Traced, tails: Mapping[str, links.Tail]) -> list[str]:
  """Paths of the parameters that are read outside of layers and of the given tails."""
  eqns, inputs = traced.jaxpr.jaxpr.eqns, traced.jaxpr.jaxpr.invars
  weights = {i: [eqns[i].invars[1 - side]] for i, side in traced.sides.items()}
  firsts = {tail.steps[0]: tail.bias for tail in tails.values() if tail.steps}
  biases = {i: [v for v in eqns[i].invars if v is not bias] for i, bias in firsts.items()}
  read = graph.needed(traced.jaxpr.jaxpr, {**biases, **weights})
  return [path for path, v in zip(traced.paths, inputs, strict=False) if v in read]
