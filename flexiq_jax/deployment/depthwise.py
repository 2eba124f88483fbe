"""Depthwise convolutions between two linked layers, in the channel order of the layer they feed.

A depthwise convolution reads and writes channel by channel, so an order of its outputs is one of
its inputs as well and folds further, into the layer before:

    expand (1x1) -- codes --> depthwise -- codes --> project (1x1)

It stays in 8 bits and has no kernel: XLA multiplies the int8 codes. Bias, activation function and
the codes of the next layer are computed as in an epilogue.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.graph import Contract, Layer
from flexiq_jax.kernels import Activation, Activations, Epilogue, Requantize, finish
from flexiq_jax.quant import quantizer, rules

Array = Any


@struct.dataclass
class Depthwise:
  """A depthwise convolution in another layer's layout.

  Attributes:
    q: its codes, `[..., P]`, with zeros for padding.
    order: int32 `[P]`, the channel of the model's activation at each place, -1 for padding; None
      where the producer brings them in this order.
    scale: float32 `[P]`, activation scale times weight scale.
    bias: float32 `[P]` or None.
    activation: activation function applied after the bias.
    feeds: name of the layer whose codes this one emits.
  """

  q: rules.QLayer
  order: Array | None
  scale: Array
  bias: Array | None
  activation: Activation = struct.field(pytree_node=False, default="none")
  feeds: str = struct.field(pytree_node=False, default="")

  def requantize(self) -> Requantize:
    """How a producer makes this layer's codes: all in 8 bits."""
    return Requantize(
      scale=self.q.x_scale,
      boundary=jnp.int32(0),
      shift=jnp.zeros(self.scale.shape, jnp.int32),
      signed=self.q.signed,
      granule=128,  # nothing need be written in 4 bits
    )


def supported(layer: Layer) -> bool:
  """Whether a layer that stays in 8 bits can take and emit channels in another order."""
  one_each = layer.kind == "depthwise" and layer.in_channels == layer.out_channels
  return one_each and layer.x_dims == (layer.x_ndim - 1,)


def pack(layer: Layer, q: rules.QLayer, order: np.ndarray) -> rules.QLayer:
  """A layer's codes and scales at the places of an order `[P]`, zeros where it is -1."""
  pick = lambda v: np.where((order < 0).reshape(-1, *[1] * (v.ndim - 1)), 0, v[order])
  w = _widened(layer, len(order)).native(pick(layer.canonical(np.asarray(q.w))))
  scale = pick(np.asarray(q.w_scale))
  return dataclasses.replace(q, w=jnp.asarray(w), w_scale=jnp.asarray(scale))


def run(
  d: Depthwise,
  layer: Layer,
  contract: Contract,
  codes: Array,
  consumer: Requantize | None,
  platform: str | None = None,
) -> Array | Activations:
  """The layer's result after its tail.

  Args:
    d: the layer.
    layer: its description.
    contract: its contraction.
    codes: int32, 8-bit codes of places, in the equation's layout with P channels.
    consumer: makes the codes of the layer it feeds; None for float32.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.

  Returns:
    `[M, P]`, float32 or the consumer's codes.
  """
  places = len(d.scale)
  eqn = contract.eqn
  wide = eqn.replace(params=dict(eqn.params) | {"feature_group_count": places})
  wide = Contract(wide, contract.side)
  acc = rules.product(_widened(layer, places), d.q, codes, d.q.w, wide, platform)
  epilogue = Epilogue(
    scale=d.scale,
    correction=jnp.zeros(places, jnp.int32),
    bias=d.bias,
    requantize=consumer,
    activation=d.activation,
  )
  return finish(acc.reshape(-1, places), epilogue)


def quantized(d: Depthwise, x: Array) -> Array:
  """Real activations `[..., C]` -> int32 codes `[..., P]`; channels are last."""
  codes = quantizer.quantize(x, quantizer.divisor(x, d.q.x_scale), 8, d.q.signed)
  if d.order is None:
    return codes
  return jnp.where(d.order < 0, 0, codes[..., jnp.maximum(d.order, 0)])


def emitted(d: Depthwise, codes: Activations, shape: tuple[int, ...]) -> Array:
  """What a producer emitted -> int32 codes of places; the shape is as given, channels aside."""
  unsigned = codes.x8.astype(jnp.int32) + (0 if d.q.signed else 128)
  return unsigned.reshape(*shape[:-1], -1)


def _widened(layer: Layer, places: int) -> Layer:
  """The layer with as many channels as there are places."""
  (out,) = layer.w_out_dims
  shape = (*layer.w_shape[:out], places, *layer.w_shape[out + 1 :])
  return dataclasses.replace(
    layer, in_channels=places, out_channels=places, groups=places, w_shape=shape
  )
