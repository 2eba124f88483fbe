"""Rules: the ways of computing a layer (see `graph.with_rule`).

| rule | computes |
|---|---|
| `float_rule` | the layer as the model wrote it |
| `observe_rule` | any rule, and records a measurement of the layer's input |
| `int8_rule` | int8 x int8 -> int32, scaled: the 8-bit base model |
| `uniform_rule` | plain uniform quantization at the width its layers were quantized to |
| `mixed_rule` | the exact integer result of a layer with some channel groups in 4 bits |

A product only ever pairs operands of the same channel, and a 4-bit code shifted back, `q4 << e`,
fits the 8-bit grid. One int8 contraction on operands chosen per channel therefore *is* the mixed
layer, bit for bit (docs/flexiq.md, step C); the mask is an ordinary traced array. The groups' bias
corrections are added to the integer sum, which is then multiplied by the scales.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct

from flexiq_jax.graph import Apply, Contract, Layer, Rule, closest, with_rule
from flexiq_jax.quant import exact, lowering, quantizer

Array = Any


@struct.dataclass
class Low:
  """What a layer needs to compute channel groups in 4 bits.

  Attributes:
    w: int8 `w_shape`, weights lowered to 4 bits and shifted back (`q4 << e`, in 8-bit steps).
    shift: int32 `[C]`, extraction shift of the activation; equal within a group.
    group: int32 `[C]`, the group each feature channel belongs to.
    bias: int32 `[J, N]`, what each group in 4 bits adds to the integer sum to correct its mean
      error; in steps of `x_scale * w_scale`.
    block: int32 `[C]`, the shift block each feature channel belongs to: channels that share their
      shifts, dynamic ones, too. None where every group is one.
  """

  w: Array
  shift: Array
  group: Array
  bias: Array
  block: Array | None = None


@struct.dataclass
class QLayer:
  """A quantized layer.

  Attributes:
    w: int8 `w_shape`, weight codes.
    w_scale: float32 `[N]`.
    x_scale: float32 scalar.
    low: the 4-bit side; None for a layer that always stays at `bits`.
    bits: width of both operands.
    signed: whether activation codes are signed; unsigned ones are 0..2^bits - 1.
    parts: runs of input channels whose sums float32 counts exactly (see `exact.parts`), with any of
      them in 4 bits; None where the codes were not examined.
  """

  w: Array
  w_scale: Array
  x_scale: Array
  low: Low | None = None
  bits: int = struct.field(pytree_node=False, default=8)
  signed: bool = struct.field(pytree_node=False, default=True)
  parts: int | None = struct.field(pytree_node=False, default=None)


QModel = Mapping[str, QLayer]
Measure = Callable[[Layer, Array], Any]


def float_rule(layer: Layer, x: Array, w: Array, contract: Contract) -> Array:
  """The layer as the model wrote it."""
  del layer
  return contract(x, w)


def observe_rule(measure: Measure, records: dict[str, Any], rule: Rule = float_rule) -> Rule:
  """`rule`, and `records[layer.name] = measure(layer, x)`.

  `records` is filled while tracing: return it from the traced function (`observing` does).
  """

  def observe(layer, x, w, contract):
    records[layer.name] = measure(layer, x)
    return rule(layer, x, w, contract)

  return observe


def observing(apply: Apply, measure: Measure, rule: Rule = float_rule) -> Apply:
  """A pure function `(params, x) -> (y, {layer name: measurement})`."""

  def run(params, x):
    records: dict[str, Any] = {}
    y = with_rule(apply, observe_rule(measure, records, rule))(params, x)
    return y, records

  return run


def uniform_rule(model: QModel, platform: str | None = None) -> Rule:
  """Uniform quantization of every layer at the width it was quantized to.

  Args:
    model: the quantized layers.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.
  """

  def uniform(layer, x, w, contract):
    del w
    q = _of(model, layer)
    codes = quantizer.quantize(x, q.x_scale, q.bits, q.signed)
    return _scaled(layer, q, product(layer, q, codes, q.w, contract, platform))

  return uniform


def int8_rule(model: QModel, platform: str | None = None) -> Rule:
  """The 8-bit base model; for the arguments see `uniform_rule`.

  Raises:
    ValueError: a layer of `model` is not 8-bit.
  """
  if wrong := [f"{name} ({q.bits})" for name, q in model.items() if q.bits != 8]:
    raise ValueError(f"model: layers that are not 8-bit: {', '.join(wrong)}")
  return uniform_rule(model, platform)


def mixed_rule(
  model: QModel,
  masks: Mapping[str, Array],
  dynamic: bool = False,
  *,
  split: bool = False,
  platform: str | None = None,
) -> Rule:
  """A layer with the masked channel groups in 4 bits and the others in 8.

  Args:
    model: 8-bit layers, those in `masks` with their `low` side.
    masks: layer name -> bool `[J]`, true for groups in 4 bits. Layers without a mask stay 8-bit.
    dynamic: choose activation shifts at run time, per example: the smaller of the static shift and
      the one the range of the example's own 4-bit channels needs (docs/flexiq.md, step G).
    split: contract each precision by itself, with zeros for the channels of the other. This takes
      twice the products for the same sums, but weights do not depend on the mask, so `jax.vmap`
      over masks need not batch them.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.

  Raises:
    ValueError: a mask for a layer without a 4-bit side, or dynamic shifts for a layer whose input
      does not keep examples apart in its first dimension.
  """
  for name in masks:
    if name not in model:
      raise ValueError(f"masks: no layer {name!r}; closest names: {closest(name, [*model])}")
    _check_mask(name, model[name], masks[name])

  def mixed(layer, x, w, contract):
    del w
    q = _of(model, layer)
    codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
    multiply = lambda codes, w: product(layer, q, codes, w, contract, platform)
    if layer.name not in masks:
      return _scaled(layer, q, multiply(codes, q.w))
    mask, low = masks[layer.name], _low(q)
    channels = mask[low.group]
    shift = layer.x_vector(low.shift, x.shape)
    if dynamic:
      shift = jnp.minimum(shift, _live_shift(layer, codes, low, mask, q.signed))
    lowered = lowering.lower_activations(codes, shift, q.signed) << shift
    in_low = layer.x_vector(channels, x.shape)
    if split:
      acc = multiply(jnp.where(in_low, lowered, 0), low.w)
      acc += multiply(jnp.where(in_low, 0, codes), q.w)
    else:
      weights = jnp.where(layer.w_vector(channels), low.w, q.w)
      acc = multiply(jnp.where(in_low, lowered, codes), weights)
    bias = jnp.where(mask[:, None], low.bias, 0).sum(axis=0)
    return _scaled(layer, q, acc + layer.y_vector(bias, acc.shape))

  return mixed


def _check_mask(name: str, q: QLayer, mask: Array) -> None:
  if q.low is None or q.bits != 8:
    raise ValueError(f"masks: layer {name} has no 4-bit side (see grouping.lower)")
  groups = q.low.bias.shape[-2]
  if mask.shape != (groups,) or mask.dtype != bool:
    raise ValueError(
      f"masks: layer {name} needs bool [{groups}], one for each channel group, not "
      f"{mask.dtype} {list(mask.shape)}"
    )


def product(
  layer: Layer, q: QLayer, codes: Array, w: Array, contract: Contract, platform: str | None = None
) -> Array:
  """Exact int32 contraction of a layer's activation codes with int8 weights (see `exact`)."""
  return exact.product(
    layer,
    codes,
    w,
    contract,
    signed=q.signed,
    bits=q.bits,
    parts=q.parts,
    platform=platform,
  )


def _scaled(layer: Layer, q: QLayer, acc: Array) -> Array:
  scale = layer.y_vector(q.w_scale * q.x_scale, acc.shape)
  return acc.astype(jnp.float32) * scale


def _live_shift(layer: Layer, codes: Array, low: Low, mask: Array, signed: bool) -> Array:
  """Range shift of each example's live codes in each shift block, spread over x.

  In a block that is only partly in 4 bits, only the channels in 4 bits count.
  """
  if not layer.x_rows:
    raise ValueError(
      f"dynamic: the first dimension of the input of layer {layer.name} is not known to hold the "
      "examples, so shifts cannot be chosen per example; use static shifts, or map the model over "
      "single examples with jax.vmap"
    )
  per_channel = jnp.abs(layer.channels_last(codes))
  examples = codes.shape[0] // layer.x_rows
  per_channel = per_channel.reshape(examples, -1, layer.in_channels).max(axis=1)
  per_channel = jnp.where(mask[low.group][None], per_channel, 0)
  block = low.group if low.block is None else low.block
  top = jnp.zeros((examples, len(mask)), jnp.int32).at[:, block].max(per_channel)
  shift = lowering.range_shift(top, signed)[:, block]
  if examples == 1:
    return layer.x_vector(shift[0], codes.shape)
  return layer.x_rows_vector(jnp.repeat(shift, layer.x_rows, axis=0), codes.shape)


def _low(q: QLayer) -> Low:
  if q.low is None:
    raise ValueError("low: the layer has no 4-bit side")
  return q.low


def _of(model: QModel, layer: Layer) -> QLayer:
  if layer.name not in model:
    raise ValueError(
      f"model: layer {layer.name} was not quantized; quantized are {closest(layer.name, [*model])}"
    )
  return model[layer.name]
