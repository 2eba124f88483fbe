"""The mixed matmul in plain jnp, for any backend: what the kernels are compared with.

Codes of both precisions, shifted back, fit int8 (docs/flexiq.md, step C), so one int8 product
serves every boundary. It is right on every backend, but 4 bits are no faster than 8.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax.kernels import packing
from flexiq_jax.kernels.lower import finish
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights, low_offsets, low_rows
from flexiq_jax.kernels.windows import Window, unfold

Array = Any


def mixed_matmul(
  x: Activations, w: Weights, epilogue: Epilogue, window: Window | None = None
) -> Array | Activations:
  """See `api.mixed_matmul`."""
  x = x if window is None else unfold(x, w, window)
  return finish(integer_sum(x, w), epilogue)


def integer_sum(x: Activations, w: Weights) -> Array:
  """int32 `[M, N]`, the sum of all products before correction and scale; x has all rows of K."""
  (m, k), n = x.x8.shape, w.w8.shape[1]
  j = k // w.block
  low = low_rows(w, x.boundary)
  shift = (w.x_shift[None] if x.row_shift is None else x.row_shift).astype(jnp.int8)
  x4 = x.x4.astype(jnp.int8).reshape(m, j, w.block) << shift[:, :, None]
  x_mix = jnp.where(low[None], x4.reshape(m, k), x.x8)
  w4 = packing.unpack(w.w4).reshape(j, w.block, n) << w.w_shift.astype(jnp.int8)[:, None]
  w_mix = jnp.where(low[:, None], w4.reshape(k, n), w.w8)
  acc = jax.lax.dot_general(
    x_mix, w_mix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
  )
  if x.row_shift is not None and w.offset:
    offsets = low_offsets(w, x.boundary) << w.w_shift
    acc += jax.lax.dot_general(
      jnp.left_shift(jnp.int32(1), x.row_shift),
      offsets,
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.int32,
    )
  return acc
