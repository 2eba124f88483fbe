"""The two kinds of deployed layer and how each is computed.

`Mixed` runs on the mixed matmul: dense layers and convolutions in both precisions. `Plain` runs as
`rules` does, on int8 products of the layer's own contraction: layers that stay in 8 bits, and
grouped or depthwise convolutions, which have no kernel.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct

from flexiq_jax import kernels
from flexiq_jax.deployment import patches
from flexiq_jax.deployment.layouts import rows_before
from flexiq_jax.graph import Contract, Layer
from flexiq_jax.kernels import Activation, Activations, Epilogue, Requantize, Window
from flexiq_jax.quant import lowering, quantizer, rules

Array = Any


@struct.dataclass
class Mixed:
  """A layer in both precisions, in its layout (see `deployment.layouts` for the symbols).

  Attributes:
    weights: `kernels.Weights`, packed, `[K, N']`, or what `deployment.place` made of them; N'
      counts the outputs in the order of the layer they feed, padding included, and is N where
      they feed no single layer.
    x_scale: float32 `[]`.
    order: int32 `[P]`, the channel of the model's activation at each place, -1 for padding; None
      where the activation comes in this order.
    places: int32 `[L]`, how many places are in 4 bits at each level.
    scale: float32 `[N']`, activation scale times weight scale.
    correction: int32 `[L, N']`.
    bias: float32 `[N']` or None.
    channels: S, the places of a shift block.
    signed: whether activation codes are signed.
    activation: activation function applied after the bias.
    feeds: name of the layer whose codes this one emits; empty for none.
  """

  weights: Any
  x_scale: Array
  order: Array | None
  places: Array
  scale: Array
  correction: Array
  bias: Array | None
  channels: int = struct.field(pytree_node=False)
  signed: bool = struct.field(pytree_node=False)
  activation: Activation = struct.field(pytree_node=False, default="none")
  feeds: str = struct.field(pytree_node=False, default="")

  @property
  def slides(self) -> bool:
    """Whether a kernel slides its window over pixels (see `kernels.windows`)."""
    return self.weights.taps > 1

  @property
  def shift(self) -> Array:
    """int32 `[P]`, static activation shift at each place."""
    return jnp.repeat(self.weights.x_shift, self.channels)


@struct.dataclass
class Plain:
  """A layer on the int8 reference path.

  Attributes:
    q: the quantized layer.
    masks: bool `[L, J]`, its groups in 4 bits at each level; None for a layer that stays in 8.
  """

  q: rules.QLayer
  masks: Array | None = None


def run_plain(
  d: Plain,
  layer: Layer,
  x: Array,
  contract: Contract,
  level: Array,
  dynamic: bool,
  platform: str | None = None,
) -> Array:
  """The layer's result as the rules compute it, float32 in the model's own layout."""
  if d.masks is None:
    return rules.uniform_rule({layer.name: d.q}, platform)(layer, x, None, contract)
  masks = {layer.name: d.masks[level]}
  rule = rules.mixed_rule({layer.name: d.q}, masks, dynamic, platform=platform)
  return rule(layer, x, None, contract)


def quantized(
  d: Mixed,
  layer: Layer,
  params: Mapping[str, Any],
  x: Array,
  level: Array,
  dynamic: bool,
  innermost: bool = False,
  **kernel: Any,
) -> Activations:
  """Real activations `[..., C]` (of a convolution `[B, *space, C]`) -> operands of the matmul.

  Activations of a linked layer are in layout order already, `[..., P]`. With `innermost` those of a
  convolution come as `[*space, B, C]`.
  """
  place, flat = d.places[level], x.reshape(-1, x.shape[-1])
  if not dynamic:
    codes = kernels.quantize_lower(
      *(flat, d.x_scale, d.shift, place),
      signed=d.signed,
      order=d.order,
      granule=_granule(d, **kernel),
      implementation=_implementation(d, **kernel),
      interpret=kernel.get("interpret", False),
    )
    return lowered(d, layer, params, (codes.x8, codes.x4), x.shape[:-1], level, innermost)
  codes = quantizer.quantize(flat, quantizer.divisor(flat, d.x_scale), 8, d.signed)
  if d.order is not None:
    codes = jnp.where(d.order[None] < 0, 0, codes[:, jnp.maximum(d.order, 0)])
  if not layer.x_rows:
    raise ValueError(
      f"dynamic: the first dimension of the input of layer {layer.name} is not known to hold the "
      "examples, so shifts cannot be chosen per example; deploy with static shifts"
    )
  examples = x.shape[0] // layer.x_rows
  low = jnp.arange(codes.shape[1], dtype=jnp.int32) < place
  codes = codes.reshape(examples, -1, codes.shape[1])
  top = jnp.where(low[None], jnp.abs(codes).max(axis=1), 0)
  top = top.reshape(examples, -1, d.channels).max(axis=2)  # [examples, J]
  shift = jnp.minimum(d.weights.x_shift[None], lowering.range_shift(top, d.signed))
  spread = jnp.repeat(shift, d.channels, axis=1)[:, None]
  x8, x4 = kernels.split_codes(codes, spread, low[None, None], d.signed)
  flatten = lambda a: a.reshape(-1, a.shape[-1])
  made = lowered(d, layer, params, (flatten(x8), flatten(x4)), x.shape[:-1], level)
  per_row = jnp.repeat(shift, len(made.x8) // examples, axis=0)
  return dataclasses.replace(made, row_shift=per_row)


def lowered(
  d: Mixed,
  layer: Layer,
  params: Mapping[str, Any],
  codes: tuple[Array, Array],
  shape: Sequence[int],
  level: Array,
  innermost: bool = False,
) -> Activations:
  """Codes of places, 8-bit and 4-bit, `[m, P]` each -> operands of the matmul.

  Args:
    d: the layer.
    layer: its static facts.
    params: parameters of its equation; empty for dense layers.
    codes: int8 and int4; unsigned codes are reduced by 128 and 8. Each is zero where the other
      precision is in use.
    shape: sizes of the dimensions before the channels.
    level: int32 `[]`.
    innermost: whether the images of a convolution are the last of these dimensions.
  """
  place, x8, x4 = d.places[level], *codes
  if d.slides:
    return Activations(x8=x8, x4=x4, boundary=place)
  boundary = rows_before(place, d.channels, math.prod(layer.window), d.weights.block)
  boundary = boundary.astype(jnp.int32)
  if d.weights.block == d.channels and patches.keep_rows(layer, params):
    return Activations(x8=x8, x4=x4, boundary=boundary)
  low = jnp.arange(x8.shape[1], dtype=jnp.int32) < place
  zero8, zero4 = (0, 0) if d.signed else (-128, -8)
  unfold = lambda codes, fill: patches.rows(
    *(layer, params, codes.reshape(*shape, -1), d.weights.block, d.channels),
    fill=fill,
    innermost=innermost,
  )
  x8 = unfold(x8, jnp.where(low, 0, zero8))
  # By way of int8: not every backend slices and pads int4.
  x4 = unfold(x4.astype(jnp.int8), jnp.where(low, zero4, 0))
  return Activations(x8=x8, x4=x4.astype(jnp.int4), boundary=boundary)


def run_mixed(
  d: Mixed,
  x: Activations,
  level: Array,
  *,
  out: str = "float32",
  tail: bool = True,
  consumer: Requantize | None = None,
  window: Window | None = None,
  **kernel: Any,
) -> Array | Activations:
  """The mixed matmul of a layer.

  Args:
    d: the layer.
    x: its operands.
    level: int32 `[]`.
    out: dtype of the result.
    tail: whether bias and activation function are computed, too.
    consumer: makes the codes of the layer that the result feeds (see `requantize`).
    window: the window, of a layer whose kernel slides it (see `patches.window`).
    **kernel: which implementation (see `kernels.mixed_matmul`).

  Returns:
    `[M, N']`, or the consumer's codes of places.
  """
  epilogue = Epilogue(
    scale=d.scale,
    correction=d.correction[level],
    bias=d.bias if tail else None,
    requantize=consumer,
    activation=d.activation if tail else "none",
    out=out,
  )
  return kernels.mixed_matmul(x, d.weights, epilogue, window=window, **kernel)


def requantize(consumer: Mixed, level: Array, **kernel: Any) -> Requantize:
  """How a producer makes a layer's codes.

  Args:
    consumer: the layer.
    level: int32 `[]`.
    **kernel: which implementation (see `kernels.mixed_matmul`).
  """
  return Requantize(
    scale=consumer.x_scale,
    boundary=consumer.places[level],
    shift=consumer.shift,
    signed=consumer.signed,
    granule=_granule(consumer, **kernel),
  )


def _implementation(d: Mixed, implementation=None, platform=None, kind=None, **_) -> str:
  return implementation or kernels.choose_implementation(d.weights, platform, kind)


def _granule(d: Mixed, **kernel: Any) -> int:
  """How many channels a layer's kernel reads at a time; 0 where that saves no writing."""
  k, n = d.weights.w8.shape
  # Where patches are made beforehand, rows of K are no places.
  if _implementation(d, **kernel) != "tpu" or (k != len(d.shift) and not d.slides):
    return 0
  if d.slides:
    return d.channels
  from flexiq_jax.kernels import tpu

  by_rule = tpu.choose_tiles(1, k, n, d.weights.block, kernel.get("kind") or tpu.device_kind()).k
  # Whichever tiles the layer takes in the end, what they read must have been written.
  shapes = (kernel.get("tuned") or {}).items()
  same = [tiles.k for s, tiles in shapes if (s.k, s.n, s.block) == (k, n, d.weights.block)]
  return math.lcm(by_rule, *same)
