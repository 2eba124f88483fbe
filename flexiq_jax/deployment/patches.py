"""Convolutions as matrix products: patches of integer codes, channel by channel (im2col).

Rows of K are (channel, window position), so that a channel is a run of rows and a shift block is
one as well. Borders are padded with the code of zero, which differs between places: unsigned codes
are stored 128 or 8 lower than their value (see `layouts.corrections`). So one constant corrects
every pixel. Convolutions of stride 1 that keep the size of their image need no patches where a
kernel knows windows (`window`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as prim

from flexiq_jax.graph import Layer, Traced, unfold
from flexiq_jax.kernels import Window

Array = Any


def supported(layer: Layer, eqn: JaxprEqn) -> bool:
  """Whether a layer is one matrix product: dense, or a convolution without groups."""
  if layer.groups != 1:
    return False
  if eqn.primitive is prim.dot_general_p:
    return True
  return all(d == 1 for d in eqn.params["lhs_dilation"])


def keep_rows(layer: Layer, params: Mapping[str, Any]) -> bool:
  """Whether rows of x are rows of the product as they are: no window, stride or border."""
  if not layer.window:
    return True
  strides, padding = params["window_strides"], params["padding"]
  return math.prod(layer.window) == 1 and {*strides} == {1} and {*padding} == {(0, 0)}


def window(layer: Layer, params: Mapping[str, Any], shape: Sequence[int]) -> Window | None:
  """How a kernel slides a convolution over pixels in rows.

  Args:
    layer: the layer.
    params: of its equation.
    shape: of its activation.

  Returns:
    The window; None for a layer that is no convolution, that changes the size of its line or image,
    or that skips pixels.
  """
  if len(layer.window) not in (1, 2) or math.prod(layer.window) == 1 or layer.groups != 1:
    return None
  padding, dilation = params["padding"], params["rhs_dilation"]
  reach = [(k - 1) * d for k, d in zip(layer.window, dilation, strict=True)]
  if {*params["window_strides"], *params["lhs_dilation"]} != {1}:
    return None
  if [low + high for low, high in padding] != reach:
    return None
  if min(map(min, padding)) < 0:
    return None
  sizes = [shape[d] for d in params["dimension_numbers"].lhs_spec[2:]]
  axes = [
    [i * d - low for i in range(k)]
    for k, d, (low, _) in zip(layer.window, dilation, padding, strict=True)
  ]
  if len(sizes) == 1:
    sizes, axes = [1, *sizes], [[0], *axes]
  offsets = tuple((dh, dw) for dh in axes[0] for dw in axes[1])
  return Window(height=sizes[0], width=sizes[1], offsets=offsets)


def windows(traced: Traced) -> dict[str, Window | None]:
  """Layer name -> `window`, for all layers of a graph."""
  found = {}
  for i, layer in traced.layers.items():
    eqn = traced.jaxpr.jaxpr.eqns[i]
    found[layer.name] = window(layer, eqn.params, eqn.invars[1 - traced.sides[i]].aval.shape)
  return found


def channels_last(layer: Layer, params: Mapping[str, Any], x: Array) -> Array:
  """The activation as `[..., C]`; of a convolution `[B, *space, C]`."""
  if not layer.window:
    return layer.channels_last(x)
  batch, feature, *space = params["dimension_numbers"].lhs_spec
  return x.transpose(batch, *space, feature)


def by_pixel(x: Array) -> Array:
  """`[B, *space, C]` -> `[*space, B, C]`: images innermost."""
  return jnp.moveaxis(x, 0, -2)


def rows(
  layer: Layer,
  params: Mapping[str, Any],
  codes: Array,
  block: int,
  channels: int,
  fill: Array,
  innermost: bool = False,
) -> Array:
  """Codes of places -> rows of K.

  Args:
    layer: the layer.
    params: of its equation.
    codes: `[..., P]`; of a convolution `[B, *space, P]`, or `[*space, B, P]` with innermost images.
    block: rows of K of a shift block.
    channels: places of a shift block.
    fill: `[P]`, the codes that borders are padded with.
    innermost: whether the images of a convolution are innermost, of codes and result.

  Returns:
    `[M, K]`.
  """
  places = codes.shape[-1]
  if layer.window:
    codes = jnp.moveaxis(codes, -2, 0) if innermost else codes
    codes = _patches(params, codes, layer.window, fill)  # [B, *space, P, window]
    codes = jnp.moveaxis(codes, 0, -3) if innermost else codes
  window = math.prod(layer.window)
  blocks = codes.reshape(-1, places // channels, channels * window)
  if block > channels * window:
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, block - channels * window)))
  return blocks.reshape(len(blocks), -1)


def result(
  layer: Layer,
  params: Mapping[str, Any],
  y: Array,
  shape: Sequence[int],
  innermost: bool = False,
) -> Array:
  """`[M, N]` -> the result of the layer's equation, of the given shape."""
  if layer.window:
    batch, feature, *space = params["dimension_numbers"].out_spec
    order = (*space, batch, feature) if innermost else (batch, *space, feature)
  else:
    order = (*(d for d in range(layer.y_ndim) if d not in layer.y_dims), *layer.y_dims)
  y = y.reshape([shape[d] for d in order])
  return y.transpose([order.index(d) for d in range(len(order))])


def _patches(params: Mapping[str, Any], x: Array, window: Sequence[int], fill: Array) -> Array:
  """`[B, *space, P]` -> `[B, *space, P, window]` by slices of the padded codes."""
  return jnp.stack(unfold.slices(params, _padded(x, params["padding"], fill), window), axis=-1)


def _padded(x: Array, padding: Sequence[tuple[int, int]], fill: Array) -> Array:
  """Pads the dimensions between the first and the last with one value for each place.

  Negative padding cuts off, as in XLA.
  """
  config = [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)]
  if all(p == (0, 0, 0) for p in config):
    return x
  inside = jax.lax.pad(jnp.ones(x.shape[1:-1], bool), False, [c for c in config[1:-1]])
  padded = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
  fill = fill.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return jnp.where(inside[None, ..., None], padded, fill)
