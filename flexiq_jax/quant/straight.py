r"""`finetune_rule`: the mixed rule with straight-through gradients, quantized from float weights.

The value is `mixed_rule`'s of the layers that `requantize` makes of the weights: the same integers,
bit for bit. The gradient is that of a real-valued stand-in in which every rounding is the identity
and every saturation a stop,

    y ~ s_x s_w (sum_c x_c w_c + sum_(c in 4 bits) correction_c),

by x, the weights and both scales (by a scale s of v: `code - v / s`, or the code where v saturates;
Esser et al., "Learned step size quantization", 2020). See docs/flexiq.md, step H.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.graph import Contract, Layer
from flexiq_jax.quant import exact, grouping, lowering, quantizer, rules

Array = Any
# Sums of mean codes are counted in two int32 numbers, in units of 1 and 1024 (`_correction`).
_LIMB = 1024


@struct.dataclass
class Scales:
  """What training changes of a quantized layer beside its weights.

  Attributes:
    x: float32 scalar, of the activation.
    w: float32 `[N]`, of the weights.
  """

  x: Array
  w: Array


@struct.dataclass
class Shifts:
  """What a layer's 4-bit side keeps while its weights change.

  Attributes:
    group: int32 `[C]`, the group each feature channel belongs to, of J.
    block: int32 `[C]` or None, as in `rules.Low`.
    x: int32 `[C]`, extraction shift of the activation.
    w: int32 `[C, 1]` or `[C, N/g]`, of the weights.
    x_mean, low_mean: int32 `[C]`, mean activation codes in 8 and in 4 bits, in `MEAN_UNITS`; None
      where biases are not corrected.
    groups: J.
  """

  group: Array
  block: Array | None
  x: Array
  w: Array
  x_mean: Array | None
  low_mean: Array | None
  groups: int = struct.field(pytree_node=False)


@struct.dataclass
class Kept:
  """What a quantized layer keeps while its weights and scales change.

  Attributes:
    shifts: of the 4-bit side; None for a layer that always stays at `bits`.
    bits, signed: as in `rules.QLayer`.
  """

  shifts: Shifts | None
  bits: int = struct.field(pytree_node=False)
  signed: bool = struct.field(pytree_node=False)


def kept(
  layer: Layer, q: rules.QLayer, cut: grouping.Cut | None, settings: grouping.LowSettings
) -> Kept:
  """What is kept of a quantized layer.

  Args:
    layer: the layer.
    q: its quantization.
    cut: its channel groups; None for a layer without a 4-bit side.
    settings: how it was lowered.

  Raises:
    ValueError: groups of so many channels that int32 cannot hold the sums of their mean codes.
  """
  if cut is None or q.low is None:
    return Kept(None, q.bits, q.signed)
  largest = max(map(len, cut.channels)) * int(np.prod(layer.window, dtype=np.int64))
  # Twice the largest sum of `_correction` in units of _LIMB, with the means' 8 bits.
  if 2 * largest * 127 * (255 * lowering.MEAN_UNITS // _LIMB + 1) >= 2**31:
    raise ValueError(
      f"group_size: layer {layer.name} has groups of {largest} weights per output; training "
      "takes up to 3,392"
    )
  means = [None, None]
  if settings.bias_correction:
    means = [
      jnp.asarray(lowering.mean_units(mean), jnp.int32) for mean in (cut.x_mean, cut.low_mean)
    ]
  return Kept(
    Shifts(
      q.low.group,
      q.low.block,
      q.low.shift,
      jnp.asarray(grouping.weight_shifts(layer, q, cut, settings)),
      *means,
      groups=len(cut.channels),
    ),
    q.bits,
    q.signed,
  )


def quantize_layer(
  layer: Layer, w: Array, scales: Scales, signed: bool, bits: int = 8
) -> rules.QLayer:
  """Quantizes one layer with given scales, without a 4-bit side."""
  q = _requantize(layer, jnp.asarray(w), scales, Kept(None, bits, signed))
  return dataclasses.replace(q, parts=exact.parts(layer, np.asarray(q.w)))


def requantize(layer: Layer, w: Array, scales: Scales, kept: Kept) -> rules.QLayer:
  """The quantized layer of some weights and scales; may be traced.

  The same integers as `quantize_layer` and `grouping.lower` make.

  Args:
    layer: the layer.
    w: real weights, `w_shape`.
    scales: of activation and weights.
    kept: everything else.
  """
  codes = layer.canonical(_weight_codes(layer, w, scales.w, kept.bits))
  q = rules.QLayer(
    w=layer.native(codes.astype(jnp.int8)),
    w_scale=scales.w,
    x_scale=scales.x,
    bits=kept.bits,
    signed=kept.signed,
  )
  shifts = kept.shifts
  if shifts is None:
    return q
  e = _canonical_shifts(layer, shifts)
  low = lowering.lower_weights(codes, e) << e
  return dataclasses.replace(
    q,
    low=rules.Low(
      w=layer.native(low.astype(jnp.int8)),
      shift=shifts.x,
      group=shifts.group,
      bias=_correction(layer, shifts, codes, low),
      block=shifts.block,
    ),
  )


def finetune_rule(
  kept: Mapping[str, Kept],
  scales: Mapping[str, Scales],
  masks: Mapping[str, Array],
  platform: str | None = None,
) -> rules.Rule:
  """A layer with some channel groups in 4 bits, quantized from the weights that the model has.

  Args:
    kept: layer name -> what stays, for all layers.
    scales: layer name -> what training changes.
    masks: layer name -> bool `[J]`, true for groups in 4 bits; layers without one stay at `bits`.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.

  Raises:
    ValueError: as `mixed_rule`.
  """

  def rule(layer: Layer, x: Array, w: Array, contract: Contract) -> Array:
    mask, own = masks.get(layer.name), kept[layer.name]

    @jax.custom_vjp
    def compute(x, w, scales, mask, own):
      q = requantize(layer, w, scales, own)
      if mask is None:
        return rules.uniform_rule({layer.name: q}, platform)(layer, x, w, contract)
      mixed = rules.mixed_rule({layer.name: q}, {layer.name: mask}, platform=platform)
      return mixed(layer, x, w, contract)

    def forward(x, w, scales, mask, own):
      return compute(x, w, scales, mask, own), (x, w, scales, mask, own)

    def backward(saved, u):
      *trained, mask, own = saved
      stand_in = lambda x, w, scales: _stand_in(layer, contract, platform, x, w, scales, mask, own)
      _, pull = jax.vjp(stand_in, *trained)
      return (*pull(u.astype(jnp.float32)), None, None)

    compute.defvjp(forward, backward)
    return compute(x, w, scales[layer.name], mask, own)

  return rule


def _stand_in(layer, contract, platform, x, w, scales, mask, own) -> Array:
  """The real-valued function whose derivatives are taken; nobody computes its value."""
  shifts, w_scale = own.shifts, per_output(layer, scales.w)
  x_codes = quantizer.quantize(x, scales.x, own.bits, own.signed)
  x_inside = _inside(x, scales.x, own.bits, own.signed)
  w_codes = _weight_codes(layer, w, scales.w, own.bits)
  w_inside = _inside(w, w_scale, own.bits, True)
  w_real = _real(w, w_scale, w_codes, w_inside)
  correction = None
  if mask is not None:
    channels = mask[shifts.group]
    e, low = layer.x_vector(shifts.x, x.shape), layer.x_vector(channels, x.shape)
    x_low = lowering.lower_activations(x_codes, e, own.signed) << e
    x_inside &= ~low | _inside_low(x_codes, x_low, e)
    x_codes = jnp.where(low, x_low, x_codes)
    e = layer.native(jnp.broadcast_to(_canonical_shifts(layer, shifts), _canonical_shape(layer)))
    w_low = lowering.lower_weights(w_codes, e) << e
    w_low = _real(w, w_scale, w_low, w_inside & _inside_low(w_codes, w_low, e))
    if shifts.x_mean is not None:
      sums = [layer.canonical(v).sum(axis=2) for v in (w_real, w_low)]  # [g, C/g, N/g]
      means = [
        (v * channels / lowering.MEAN_UNITS).reshape(layer.groups, -1, 1)
        for v in (shifts.x_mean, shifts.low_mean)
      ]
      correction = (means[0] * sums[0] - means[1] * sums[1]).sum(axis=1).reshape(-1)
    w_real = jnp.where(layer.w_vector(channels), w_low, w_real)
  y = exact.real_product(layer, _real(x, scales.x, x_codes, x_inside), w_real, contract, platform)
  if correction is not None:
    y += layer.y_vector(correction * scales.x, y.shape)
  return y


def _real(v: Array, scale: Array, codes: Array, inside: Array) -> Array:
  """`scale * codes`: its derivative by v is one inside, by the scale `codes - v / scale` there.

  Outside, where the codes saturate, they are none and `codes`.
  """
  v = v.astype(jnp.float32)
  held = jnp.where(inside, v, 0.0)
  return held + scale * jax.lax.stop_gradient(codes - held / scale)


def _inside(v: Array, scale: Array, bits: int, signed: bool) -> Array:
  """Whether codes of real values do not saturate."""
  lo, hi = quantizer.code_range(bits, signed)
  steps = v.astype(jnp.float32) / scale
  return (steps >= lo - 0.5) & (steps <= hi + 0.5)


def _inside_low(codes: Array, low: Array, e: Array) -> Array:
  """The same of codes that are lowered, with `low` as 8-bit codes."""
  return 2 * jnp.abs(low - codes) <= (1 << e)


def _weight_codes(layer: Layer, w: Array, scale: Array, bits: int) -> Array:
  scale = quantizer.divisor(w, per_output(layer, scale))
  return quantizer.quantize(w, scale, bits)


def per_output(layer: Layer, v: Array) -> Array:
  """One value for each output channel `[N]` -> an array of w's shape."""
  shape = _canonical_shape(layer)
  return layer.native(jnp.broadcast_to(v.reshape(layer.groups, 1, 1, -1), shape))


def _canonical_shape(layer: Layer) -> tuple[int, ...]:
  inner, window = layer.in_channels // layer.groups, int(np.prod(layer.window, dtype=np.int64))
  return layer.groups, inner, window, layer.out_channels // layer.groups


def _canonical_shifts(layer: Layer, shifts: Shifts) -> Array:
  """Weight shifts as `[g, C/g, 1, 1 or N/g]`."""
  return shifts.w.reshape(layer.groups, layer.in_channels // layer.groups, 1, -1)


def _correction(layer: Layer, shifts: Shifts, codes: Array, low: Array) -> Array:
  """int32 `[J, N]`, `rint(sum_c (x_mean w8 - low_mean w4))` (`grouping.lower`), exactly.

  A mean is `1024 a + b` units; sums of a and of b stay below 2^31 where their product would not.
  """
  if shifts.x_mean is None or shifts.low_mean is None:
    return jnp.zeros((shifts.groups, layer.out_channels), jnp.int32)
  sums = [v.sum(axis=2, dtype=jnp.int32) for v in (codes, low)]  # [g, C/g, N/g]
  means = [v.reshape(layer.groups, -1, 1) for v in (shifts.x_mean, shifts.low_mean)]
  own = jnp.arange(layer.in_channels) // (layer.in_channels // layer.groups)

  def total(part):
    each = (part(means[0]) * sums[0] - part(means[1]) * sums[1]).reshape(layer.in_channels, -1)
    rows = shifts.group * layer.groups + own
    return jax.ops.segment_sum(each, rows, shifts.groups * layer.groups)

  coarse, fine = total(lambda m: m // _LIMB), total(lambda m: m % _LIMB)
  # 1024 / 10000 is 64 / 625, so 625 coarse units are the whole number 64.
  whole, rest = coarse // 625, coarse % 625
  bias = 64 * whole + lowering.divide_half_even(_LIMB * rest + fine, lowering.MEAN_UNITS)
  return bias.reshape(shifts.groups, layer.out_channels)


_requantize = jax.jit(requantize, static_argnums=0)
