"""What the TPU kernel does with a tile of integer sums: scale, activate, store or requantize.

It runs once an output, whatever K is, and takes as long as some hundred rows of K, so operations
are counted:

* Scales of the next layer are folded into this one's where the activation function allows (none,
  ReLU, ReLU6), and a constant of GELU's into them elsewhere.
* Rounding half to even and the conversion to integers are one addition: beside 1.5 * 2^23 a
  float32 has a step of 1, and the low bits of its pattern are the integer.
* Codes are limited before they are rounded, to integers, which comes to the same. 4-bit codes,
  too: `clip((q + half) >> e, lo, hi)` is `(clip(q, lo', hi') + half) >> e`; the offset of
  unsigned ones joins the half. So 4 bits cost one shift more than 8.
* A tile wholly on one side of the next layer's boundary makes one precision only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexiq_jax.kernels import lower
from flexiq_jax.kernels.operands import Epilogue
from flexiq_jax.quant import lowering, quantizer

Array = Any
_MAGIC = 1.5 * 2**23
_MAGIC_BITS = 0x4B400000
_GELU_ROOT = math.sqrt(0.5 / math.log(2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """One tile of outputs, which are channels of the next layer.

  Attributes:
    steps: rows -> results there in steps of the next layer's scale, float32.
    vectors: what `limits` names, `[1, n]` each.
    start: number of the tile's first output.
    boundary: how many outputs are in 4 bits in the next layer.
    written: end of the outputs to be written in 4 bits, start of those in 8.
    least: smallest 8-bit code.
    signed: whether the next layer's codes are signed.
  """

  steps: Callable[[Any], Array]
  vectors: dict[str, Any]
  start: Array
  boundary: Array
  written: tuple[Any, Any]
  least: int
  signed: bool


def vectors(epilogue: Epilogue) -> dict[str, Array]:
  """The operands of an epilogue that have a value for each output, `[1, N]`."""
  found = {"correction": epilogue.correction, "scale": epilogue.scale}
  if epilogue.bias is not None:
    found["bias"] = epilogue.bias
  factor = _GELU_ROOT if epilogue.activation == "gelu" else 1.0
  if (r := epilogue.requantize) is not None:
    inverse = 1 / (r.scale * factor)
    factor = inverse if _linear(epilogue.activation) else factor
    found |= limits(r.shift, r.signed, least_code(epilogue.activation, r.signed))
    found["inverse"] = jnp.broadcast_to(inverse, epilogue.scale.shape)
  for name in {"scale", "bias"} & found.keys():
    found[name] = found[name] * factor
  return {name: vector[None] for name, vector in found.items()}


def least_code(activation: str, signed: bool) -> int:
  """The smallest 8-bit code behind an activation function, where it is linear elsewhere."""
  return 0 if activation in ("relu", "relu6") else quantizer.code_range(8, signed)[0]


def limits(shift: Array, signed: bool, lo: int) -> dict[str, Array]:
  """Limits of the 8-bit code that a 4-bit code is taken from, and what is added to it.

  Args:
    shift: int32 `[N]`, extraction shift of each output.
    signed: whether codes are signed.
    lo: smallest 8-bit code.
  """
  hi = quantizer.code_range(8, signed)[1]
  least, most = lowering.low_range(signed)
  step = jnp.left_shift(jnp.int32(1), shift)
  half = step >> 1
  return {
    "low_least": jnp.maximum(least * step - half, lo).astype(jnp.float32),
    "low_most": jnp.minimum((most + 1) * step - 1 - half, hi).astype(jnp.float32),
    "low_base": half - _MAGIC_BITS - (0 if signed else 8 * step),
    "next_shift": shift,
  }


def store(sums: Array, vectors: dict[str, Any], out: Any, part: Any, activation: str) -> None:
  """Writes some rows of a tile as int32 sums or real values."""
  if out.dtype == jnp.int32:
    out[part] = sums
  else:
    y = _real(sums, vectors)
    y = gelu(y) * (1 / _GELU_ROOT) if activation == "gelu" else lower.activate(y, activation)
    out[part] = y.astype(out.dtype)


def requantize(tile: Tile, out8: Any, out4: Any) -> None:
  """Writes a tile as the next layer's codes, each output in the precision that it has there."""
  stop = tile.start + out8.shape[1]
  end, begin = tile.written
  v = tile.vectors
  most = float(quantizer.code_range(8, tile.signed)[1])
  high_base = -_MAGIC_BITS - (0 if tile.signed else 128)

  def write(part, low: bool, high: bool):
    y = tile.steps(part)
    place = tile.start + jax.lax.broadcasted_iota(jnp.int32, y.shape, 1)
    if high:
      x8 = rounded_bits(jnp.clip(y, float(tile.least), most)) + high_base
      out8[part] = (jnp.where(place < tile.boundary, 0, x8) if low else x8).astype(jnp.int8)
    if low:
      limited = jnp.minimum(jnp.maximum(y, v["low_least"][...]), v["low_most"][...])
      x4 = (rounded_bits(limited) + v["low_base"][...]) >> v["next_shift"][...]
      out4[part] = (jnp.where(place < tile.boundary, x4, 0) if high else x4).astype(jnp.int4)

  def rows(low: bool, high: bool):
    return lambda: each(out8.shape[0], functools.partial(write, low=low, high=high))

  def clear(out: Any):
    """A precision that the tile does not use, and the next layer reads around its boundary."""

    def zero(part):
      out[part] = jnp.zeros((part.size, out.shape[1]), out.dtype)

    return lambda: each(out.shape[0], zero)

  is_low, is_high = stop <= tile.boundary, tile.start >= tile.boundary
  pl.when(is_high)(rows(low=False, high=True))
  pl.when(is_low)(rows(low=True, high=False))
  pl.when(~is_low & ~is_high)(rows(low=True, high=True))
  pl.when(is_high & (tile.start < end))(clear(out4))
  pl.when(is_low & (stop > begin))(clear(out8))


def each(m: int, write: Callable[[Any], None]) -> None:
  """Calls `write` for slices of at most 256 of m rows, in a loop: the code is long enough."""
  size = next(size for size in (256, 192, 128, 64) if m % size == 0)

  def step(i, _):
    write(pl.ds(pl.multiple_of(i * size, size), size))

  jax.lax.fori_loop(0, m // size, step, None)


def _real(sums: Array, vectors: dict[str, Any]) -> Array:
  y = sums.astype(jnp.float32) * vectors["scale"][...]
  return y + vectors["bias"][...] if "bias" in vectors else y


def scaled(sums: Array, vectors: dict[str, Any], activation: str) -> Array:
  """Integer sums -> results in steps of the next layer's scale, float32."""
  y, inverse = _real(sums, vectors), vectors["inverse"]
  if activation == "relu6":
    y = jnp.minimum(y, 6 * inverse[...])
  if _linear(activation):
    return y
  return (gelu(y) if activation == "gelu" else lower.activate(y, activation)) * inverse[...]


def rounded_bits(y: Array) -> Array:
  """The pattern of y rounded half to even, an int32 above `_MAGIC_BITS` by its value."""
  return jax.lax.bitcast_convert_type(y + jnp.float32(_MAGIC), jnp.int32)


def rounded(y: Array) -> Array:
  """Rounded half to even, int32; for magnitudes below 2^22."""
  return rounded_bits(y) - _MAGIC_BITS


def gelu(r: Array) -> Array:
  """`c GELU(r / c)`, c = sqrt(log2(e) / 2), to within 1e-6, in half the operations of erf.

  With Abramowitz and Stegun's 7.1.26, `erf(z) = 1 - P(1 / (1 + p z)) exp(-z^2)` for z >= 0 (error
  below 1.5e-7), both signs are `max(y, 0) - |y| P exp(-y^2 / 2) / 2`; `exp(-y^2 / 2) = 2^(-r^2)`.
  """
  size = jnp.abs(r)
  below = 1 + jnp.float32(0.3275911 * 0.5**0.5 / _GELU_ROOT) * size
  t = pl.reciprocal(below, approx=True)
  t = t * (2 - below * t)  # Newton's step makes the hardware's estimate a float32
  p = jnp.float32(0.5 * 1.061405429)
  for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
    p = p * t + jnp.float32(0.5 * c)
  return jnp.maximum(r, 0) - size * (p * t) * jnp.exp2(-(r * r))


def _linear(activation: str) -> bool:
  """Whether scaling may be moved in front of it (scales are positive)."""
  return activation in ("none", "relu", "relu6")
