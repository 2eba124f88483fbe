"""Depthwise convolution with integer weights as multiply-adds of shifted slices.

XLA's CPU backend is slow at depthwise convolution, integer or not. A sum over the window's
positions of `slice(x) * w` is one fused elementwise loop instead and much faster. Sums are formed
in float32, which counts exactly below 2^24.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any

EXACT = 2**24


def applies(params: Mapping[str, Any], x: Array, w: Array) -> bool:
  """Whether `multiply_add` computes a convolution with these parameters, on this backend."""
  numbers = params["dimension_numbers"]
  channels = x.shape[numbers.lhs_spec[1]]
  return (
    jax.default_backend() == "cpu"
    and x.dtype in (jnp.int8, jnp.uint8, jnp.float32)
    and w.dtype == jnp.int8
    and params["feature_group_count"] == channels > 1
    and params["batch_group_count"] == 1
    and all(d == 1 for d in params["lhs_dilation"])
    # 255 * 128: the largest product of an 8-bit activation with an 8-bit weight
    and math.prod(w.shape[d] for d in numbers.rhs_spec[2:]) * 255 * 128 < EXACT
  )


def multiply_add(params: Mapping[str, Any], x: Array, w: Array) -> Array:
  """The convolution as float32; exact for 8-bit codes.

  Args:
    params: of `conv_general_dilated`; see `applies`.
    x: int8 or uint8 codes, or float32 values.
    w: int8 codes, `N / C` outputs for each channel.
  """
  numbers = params["dimension_numbers"]
  x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
  w = w.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
  x, w = x.astype(jnp.float32), w.astype(jnp.float32)
  window, strides, dilation = w.shape[:-2], params["window_strides"], params["rhs_dilation"]
  x = lax.pad(x, 0.0, [(0, 0, 0), *((*p, 0) for p in params["padding"]), (0, 0, 0)])
  outputs = w.shape[-1] // x.shape[-1]
  x = jnp.repeat(x, outputs, axis=-1) if outputs > 1 else x
  reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
  sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
  y = jnp.zeros((x.shape[0], *sizes, x.shape[-1]), jnp.float32)
  for position in itertools.product(*map(range, window)):
    starts = [i * d for i, d in zip(position, dilation, strict=True)]
    stops = [a + (n - 1) * s + 1 for a, n, s in zip(starts, sizes, strides, strict=True)]
    piece = lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *strides, 1))
    y = y + piece * w[position].reshape((1,) * (x.ndim - 1) + (-1,))
  batch, feature, *spatial = numbers.out_spec
  order = [0] * y.ndim
  order[batch], order[feature] = 0, y.ndim - 1
  for i, d in enumerate(spatial):
    order[d] = i + 1
  return y.transpose(order)
