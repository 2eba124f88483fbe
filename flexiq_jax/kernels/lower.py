"""The step before a mixed matmul: quantize, permute, lower, and keep one precision per channel.

Everything after the gather is elementwise, so XLA makes one loop of it that reads x once. Where a
producer emits codes in layout order already, its epilogue does the same work (`finish`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax.kernels.operands import Activations, Epilogue
from flexiq_jax.quant import lowering, quantizer

Array = Any


def split_codes(codes: Array, shift: Array, low: Array, signed: bool) -> tuple[Array, Array]:
  """8-bit codes -> the two operands of the mixed matmul.

  Args:
    codes: int32 `[..., K]`, 8-bit codes.
    shift: int32, broadcasts against codes: activation shift of each entry.
    low: bool, broadcasts against codes: which entries are in 4 bits.
    signed: whether codes are signed; 128 and 8 are subtracted from unsigned ones.

  Returns:
    int8 `[..., K]`, zero where low; int4 `[..., K]`, zero elsewhere.
  """
  q4 = lowering.lower_activations(codes, shift, signed)
  if not signed:
    codes, q4 = codes - 128, q4 - 8
  x8 = jnp.where(low, 0, codes).astype(jnp.int8)
  # By way of int8: not every backend turns int32 into int4 at once.
  return x8, jnp.where(low, q4, 0).astype(jnp.int8).astype(jnp.int4)


def quantize_lower(
  x: Array,
  scale: Array,
  shift: Array,
  boundary: Array,
  *,
  signed: bool,
  order: Array | None = None,
) -> Activations:
  """Real activations -> operands of the mixed matmul with static shifts.

  Args:
    x: float `[M, C]`.
    scale: float32 `[]`, activation scale.
    shift: int32 `[K]`, activation shift of each row of K.
    boundary: int32 `[]`, how many rows of K are in 4 bits.
    signed: whether codes are signed.
    order: int32 `[K]`, the channel of x at each place of the layout, -1 for padding (its weights
      are zero, so any code does); None where x already has the layout.
  """
  codes = quantizer.quantize(x, quantizer.divisor(x, scale), 8, signed)
  if order is not None:
    codes = jnp.where(order < 0, 0, codes[:, jnp.maximum(order, 0)])
  low = jnp.arange(codes.shape[1], dtype=jnp.int32) < boundary
  x8, x4 = split_codes(codes, shift[None], low[None], signed)
  return Activations(x8=x8, x4=x4, boundary=jnp.asarray(boundary, jnp.int32))


def activate(y: Array, activation: str) -> Array:
  """The activation functions of an epilogue."""
  match activation:
    case "relu":
      return jnp.maximum(y, 0)
    case "relu6":
      return jnp.clip(y, 0, 6)
    case "gelu" | "gelu_tanh":
      return jax.nn.gelu(y, approximate=activation == "gelu_tanh")
  return y


def finish(acc: Array, epilogue: Epilogue) -> Array | Activations:
  """Integer sums `[M, N]` -> the result that an epilogue asks for.

  Returns:
    `[M, N]` of dtype `epilogue.out`, or the next layer's operands.
  """
  acc = acc + epilogue.correction[None]
  if epilogue.out == "int32":
    return acc
  y = acc.astype(jnp.float32) * epilogue.scale[None]
  if epilogue.bias is not None:
    y = y + epilogue.bias[None]
  y = activate(y, epilogue.activation)
  if (r := epilogue.requantize) is None:
    return y.astype(epilogue.out)
  return quantize_lower(y, r.scale, r.shift, r.boundary, signed=r.signed)
