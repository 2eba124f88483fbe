"""What the TPU kernel does with a tile of integer sums: scale, activate, store or requantize.

It runs once an output, whatever K is, and takes as long as some hundred rows of K, so operations
are counted:

* Scales and limits of the next layer are folded into this one's where the activation function
  allows (none, ReLU, ReLU6): one multiplication, one addition, two limits.
* Rounding half to even and the conversion to integers are one addition: beside 1.5 * 2^23 a
  float32 has a step of 1, and the low bits of its pattern are the integer.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """One tile of outputs.

  Attributes:
    sums: int32 `[m, n]` in VMEM, correction included.
    vectors: what `vectors` names, `[1, n]` each.
    start: number of its first output.
    boundary: how many outputs are in 4 bits in the next layer.
    written: end of the outputs to be written in 4 bits, start of those in 8.
  """

  sums: Any
  vectors: dict[str, Any]
  start: Array
  boundary: Array
  written: tuple[Array, Array]


def vectors(epilogue: Epilogue) -> dict[str, Array]:
  """The operands of an epilogue that have a value for each output, `[1, N]`."""
  found = {"correction": epilogue.correction, "scale": epilogue.scale}
  if epilogue.bias is not None:
    found["bias"] = epilogue.bias
  if (r := epilogue.requantize) is not None:
    inverse = 1 / r.scale
    if _linear(epilogue.activation):
      for name in {"scale", "bias"} & found.keys():
        found[name] = found[name] * inverse
    found["inverse"] = jnp.broadcast_to(inverse, epilogue.scale.shape)
    found["next_shift"] = r.shift
  return {name: vector[None] for name, vector in found.items()}


def store(sums: Array, vectors: dict[str, Any], out: Any, part: Any, activation: str) -> None:
  """Writes some rows of a tile as int32 sums or real values."""
  if out.dtype == jnp.int32:
    out[part] = sums
  else:
    out[part] = _activate(_real(sums, vectors), activation).astype(out.dtype)


def requantize(tile: Tile, out8: Any, out4: Any, activation: str, signed: bool) -> None:
  """Writes a tile as the next layer's codes, each output in the precision that it has there."""
  stop = tile.start + out8.shape[1]
  end, begin = tile.written
  shift = tile.vectors["next_shift"]

  def write(part, low: bool, high: bool):
    codes = _codes(tile, part, activation, signed)
    place = tile.start + jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
    if high:
      x8 = codes if signed else codes - 128
      out8[part] = (jnp.where(place < tile.boundary, 0, x8) if low else x8).astype(jnp.int8)
    if low:
      x4 = lowering.lower_activations(codes, shift[...], signed)
      x4 = x4 if signed else x4 - 8
      out4[part] = (jnp.where(place < tile.boundary, x4, 0) if high else x4).astype(jnp.int4)

  def rows(low: bool, high: bool):
    return lambda: _each(out8, functools.partial(write, low=low, high=high))

  def clear(out: Any):
    """A precision that the tile does not use, and the next layer reads around its boundary."""

    def zero(part):
      out[part] = jnp.zeros((part.size, out.shape[1]), out.dtype)

    return lambda: _each(out, zero)

  is_low, is_high = stop <= tile.boundary, tile.start >= tile.boundary
  pl.when(is_high)(rows(low=False, high=True))
  pl.when(is_low)(rows(low=True, high=False))
  pl.when(~is_low & ~is_high)(rows(low=True, high=True))
  pl.when(is_high & (tile.start < end))(clear(out4))
  pl.when(is_low & (stop > begin))(clear(out8))


def _each(out: Any, write: Callable[[Any], None]) -> None:
  """Calls `write` for slices of at most 256 rows, in a loop: the code is long enough as it is."""
  m = out.shape[0]
  size = next(size for size in (256, 192, 128, 64) if m % size == 0)

  def step(i, _):
    write(pl.ds(pl.multiple_of(i * size, size), size))

  jax.lax.fori_loop(0, m // size, step, None)


def _real(sums: Array, vectors: dict[str, Any]) -> Array:
  y = sums.astype(jnp.float32) * vectors["scale"][...]
  return y + vectors["bias"][...] if "bias" in vectors else y


def _codes(tile: Tile, part, activation: str, signed: bool) -> Array:
  """int32 8-bit codes of the next layer."""
  lo, hi = quantizer.code_range(8, signed)
  y, inverse = _real(tile.sums[part], tile.vectors), tile.vectors["inverse"]
  if activation == "relu6":
    y = jnp.minimum(y, 6 * inverse[...])
  if _linear(activation):
    lo = lo if activation == "none" else 0
  else:
    y = _activate(y, activation) * inverse[...]
  y = jnp.clip(y, float(lo), float(hi)) + jnp.float32(_MAGIC)
  return jax.lax.bitcast_convert_type(y, jnp.int32) - _MAGIC_BITS


def _activate(y: Array, activation: str) -> Array:
  return gelu(y) if activation == "gelu" else lower.activate(y, activation)


def gelu(y: Array) -> Array:
  """Exact GELU of float32 to within 1e-6, in half the operations that the compiler's erf takes.

  With Abramowitz and Stegun's 7.1.26, `erf(z) = 1 - P(1 / (1 + p z)) exp(-z^2)` for z >= 0 (error
  below 1.5e-7), both signs are `max(y, 0) - |y| P exp(-y^2 / 2) / 2`.
  """
  size = jnp.abs(y)
  below = 1 + jnp.float32(0.3275911 * 0.5**0.5) * size
  t = pl.reciprocal(below, approx=True)
  for _ in range(2):  # Newton's: the estimate may have eight bits only
    t = t * (2 - below * t)
  p = jnp.float32(0.5 * 1.061405429)
  for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
    p = p * t + jnp.float32(0.5 * c)
  root = jnp.float32(math.sqrt(0.5 / math.log(2))) * y
  return jnp.maximum(y, 0) - size * (p * t) * jnp.exp2(-root * root)


def _linear(activation: str) -> bool:
  """Whether scaling may be moved in front of it (scales are positive)."""
  return activation in ("none", "relu", "relu6")
