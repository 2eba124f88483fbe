"""Reconstruction: all layers' weights are rounded anew, by the outputs that they give.

No training: one pass over calibration examples for each ratio, then each layer by itself (see
`rounding`). Order, groups and scales stay. docs/flexiq.md, step H.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph, models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.finetuning.refit import refit
from flexiq_jax.finetuning.rounding import Rounded, covariance, round_weights
from flexiq_jax.finetuning.settings import ReconstructionSettings
from flexiq_jax.graph import Contract, Layer
from flexiq_jax.network import Network
from flexiq_jax.quant import grouping, lowering, quantizer, rules, straight

Array = Any
Masks = Mapping[float, Mapping[str, Array]]  # ratio -> layer name -> bool [J]
# Weights of one output above which the squared moments do not fit a machine: 256 MiB a ratio.
LARGEST = 8192


def reconstruct(
  model: AdaptiveModel,
  batches: Iterable[Array],
  settings: ReconstructionSettings,
  progress: Callable[[str, int], None] | None = None,
) -> tuple[AdaptiveModel, dict[str, dict[float, float]]]:
  """Rounds the weights of a model anew.

  Args:
    model: static shifts. Layers that are never in 4 bits, have contraction groups, or more than
      `LARGEST` weights an output stay as they are.
    batches: calibration inputs `[B, ...]`.
    settings: of the reconstruction.
    progress: called as `progress(pass, examples done)`; of the rounding, which takes no examples,
      as if it did.

  Returns:
    The model with its new weights, and for each layer that was changed by ratio the output's
    squared error over the one before.

  Raises:
    ValueError: dynamic shifts, or no batches.
  """
  if model.dynamic:
    raise ValueError("model: dynamic shifts are chosen at run time; reconstruct a static model")
  batches = list(batches)
  if not batches:
    raise ValueError("batches: none; reconstruction needs calibration examples")
  network, tell = model.network, progress or (lambda what, done: None)
  masks = {ratio: model.schedule.masks(ratio) for ratio in settings.ratios}
  layers = [network.layer(name) for name in model.cuts if _fits(network.layer(name))]
  moments = _moments(model, layers, batches, masks, tell)
  how = {"sweeps": settings.sweeps, "balance": settings.balance}
  solve = jax.jit(functools.partial(round_weights, **how))
  rounded: dict[str, Rounded] = {}
  examples = sum(len(jax.tree.leaves(x)[0]) for x in batches)
  for done, layer in enumerate(layers, start=1):
    rounded[layer.name] = _round(solve, model, layer, moments.pop(layer.name), masks)
    tell("rounding", examples * done // len(layers))
  params = models.flatten(network.params)
  for layer in layers:
    real = rounded[layer.name].codes.astype(jnp.float32) * model.model[layer.name].w_scale[None]
    params[layer.param] = layer.native(real.reshape(1, layer.in_channels, -1, layer.out_channels))
  scales = {name: straight.Scales(q.x_scale, q.w_scale) for name, q in model.model.items()}
  errors = {
    name: dict(zip(settings.ratios, _left(found), strict=True)) for name, found in rounded.items()
  }
  return refit(model, models.unflatten(params), scales, batches), errors


def _left(found: Rounded) -> list[float]:
  """Share of the error that is left, 1 where there was none."""
  before, after = np.asarray(found.before), np.asarray(found.after)
  return np.divide(after, before, out=np.ones_like(after), where=before > 0).tolist()


def _fits(layer: Layer) -> bool:
  return layer.groups == 1 and layer.in_channels * math.prod(layer.window) <= LARGEST


def moment_pass(network: Network, layers: Iterable[Layer]):
  """`(model, masks, params, x) -> {layer name: (rows, their sum, sum of outer products)}`.

  Rows are what an output of the layer multiplies its weights with: input codes, those of channels
  in 4 bits lowered.
  """
  names = {layer.name for layer in layers}

  def run(model, masks, params, x):
    records, mixed = {}, rules.mixed_rule(model, masks, platform=network.platform)

    def rule(layer: Layer, x: Array, w: Array, contract: Contract) -> Array:
      if layer.name in names:
        codes = _mixed_codes(layer, model[layer.name], masks[layer.name], x)
        rows = _rows(layer, codes.astype(jnp.float32), contract)
        second = jnp.matmul(rows.T, rows, precision="highest")
        records[layer.name] = jnp.float32(len(rows)), rows.sum(axis=0), second
      return mixed(layer, x, w, contract)

    graph.with_rule(network.apply, rule)(params, x)
    return records

  return run


def _moments(
  model: AdaptiveModel,
  layers: list[Layer],
  batches: list[Array],
  masks: Masks,
  tell: Callable[[str, int], None],
) -> dict[str, np.ndarray]:
  """Covariances of all layers' rows, float32 `[V, R, R]`."""
  run, found = jax.jit(moment_pass(model.network, layers)), {layer.name: [] for layer in layers}
  for ratio, own in masks.items():
    sums, done = None, 0
    for x in batches:
      records = run(model.model, own, model.network.params, x)
      sums = records if sums is None else jax.tree.map(jnp.add, sums, records)
      done += len(jax.tree.leaves(x)[0])
      tell(f"moments at {100 * ratio:g} %", done)
    for name, (count, total, second) in (sums or {}).items():
      sums_of = float(count), np.asarray(total), np.asarray(second)
      found[name].append(covariance(*sums_of, central=model.settings.bias_correction))
  return {name: np.stack(each) for name, each in found.items()}


def _mixed_codes(layer: Layer, q: rules.QLayer, mask: Array, x: Array) -> Array:
  """What `mixed_rule` multiplies: int32 of x's shape."""
  assert q.low is not None
  codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
  shift = layer.x_vector(q.low.shift, x.shape)
  lowered = lowering.lower_activations(codes, shift, q.signed) << shift
  return jnp.where(layer.x_vector(mask[q.low.group], x.shape), lowered, codes)


def _rows(layer: Layer, x: Array, contract: Contract) -> Array:
  """`[P, R]`, what each position of the output is a product with: channels, window within them."""
  if layer.kind == "dense":
    return layer.channels_last(x).reshape(-1, layer.in_channels)
  count = layer.in_channels * math.prod(layer.window)
  (out,) = layer.w_out_dims
  shape = tuple(count if d == out else n for d, n in enumerate(layer.w_shape))
  wide = dataclasses.replace(layer, out_channels=count, w_shape=shape)
  # A convolution whose outputs are the patches that it reads: padding, strides and all.
  eye = jnp.eye(count, dtype=jnp.float32).reshape(1, layer.in_channels, -1, count)
  y = contract(x, wide.native(eye), jnp.float32)
  rest = [d for d in range(y.ndim) if d not in layer.y_dims]
  return y.transpose(*rest, *layer.y_dims).reshape(-1, count)


def _round(
  solve: Callable[..., Rounded],
  model: AdaptiveModel,
  layer: Layer,
  moments: np.ndarray,
  masks: Masks,
) -> Rounded:
  q, cut = model.model[layer.name], model.cuts[layer.name]
  assert q.low is not None
  window = math.prod(layer.window)
  flat = lambda w: jnp.asarray(layer.canonical(w)).reshape(layer.in_channels * window, -1)
  spread = lambda v: jnp.repeat(jnp.asarray(v), window, axis=0)
  weights = jnp.asarray(model.network.weights[layer.name], jnp.float32)
  low = [spread(own[layer.name][q.low.group]) for own in masks.values()]
  mean = spread(cut.x_mean) if model.settings.bias_correction else jnp.zeros(len(moments[0]))
  return solve(
    jnp.asarray(moments),
    mean.astype(jnp.float32),
    flat(weights) / q.w_scale[None],
    flat(q.w).astype(jnp.int32),
    spread(grouping.weight_shifts(layer, q, cut, model.settings)),
    jnp.stack(low),
    q.w_scale,
  )
