"""What the TPU kernel does with a tile of integer sums: scale, activate, store or requantize.

It runs once per output, whatever K is, and takes as long as the products of some hundred rows of K,
so it should take few operations:

* Scales of the next layer are folded into this one's where the activation function allows (none,
  ReLU, ReLU6), and a constant of GELU's into them elsewhere.
* GELU is one transcendental operation where the generation has erf in hardware (v6e, v7x).
* Rounding half to even and the conversion to integers are one addition: beside 1.5 * 2^23 a
  float32 has a step of 1, and the low bits of its pattern are the integer.
* Codes are limited before they are rounded, to integers, which comes to the same. 4-bit codes,
  too: `clip((q + half) >> e, lo, hi)` is `(clip(q, lo', hi') + half) >> e`; half and the offset
  of unsigned ones join the constant. So 4 bits cost one shift more than 8.
* Outputs wholly on one side of the next layer's boundary make one precision only; a tile is
  taken in strips of what the next layer reads at once, so that no more than one strip makes both.
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
    steps: (rows, columns) -> results there in steps of the next layer's scale, float32.
    vectors: what `limits` names, `[1, n]` each.
    strip: columns to be taken at once, a divisor of n.
    start: number of the tile's first output.
    boundary: how many outputs are in 4 bits in the next layer.
    written: end of the outputs to be written in 4 bits, start of those in 8.
    least: smallest 8-bit code.
    signed: whether the next layer's codes are signed.
    turn: rows of one turn of the loop that writes the tile; 0: as many as pay where `steps` only
      reads (`epilogue_rows`).
    parts: (first, number) of rows that are handed to `steps` at once in a turn; empty: all.
  """

  steps: Callable[[Any, Any], Array]
  vectors: dict[str, Any]
  strip: int
  start: Array
  boundary: Array
  written: tuple[Any, Any]
  least: int
  signed: bool
  turn: int = 0
  parts: tuple[tuple[int, int], ...] = ()


def vectors(epilogue: Epilogue, erf: bool = False) -> dict[str, Array]:
  """The operands of an epilogue that have a value for each output, `[1, N]`.

  Args:
    epilogue: what follows the integer sum.
    erf: whether the hardware has it; `scaled` and `store` are told the same.
  """
  found = {"correction": epilogue.correction, "scale": epilogue.scale}
  if epilogue.bias is not None:
    found["bias"] = epilogue.bias
  factor, grown = _factors(erf) if epilogue.activation == "gelu" else (1.0, 1.0)
  if (r := epilogue.requantize) is not None:
    inverse = 1 / (r.scale * grown)
    factor = inverse if _linear(epilogue.activation) else factor
    found |= limits(r.shift, r.signed, least_code(epilogue.activation, r.signed))
    found["inverse"] = jnp.broadcast_to(inverse, epilogue.scale.shape)
  for name in {"scale", "bias"} & found.keys():
    found[name] = found[name] * factor
  return {name: vector[None] for name, vector in found.items()}


def least_code(activation: str, signed: bool) -> int:
  """The smallest 8-bit code after an activation function that is linear above it."""
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
    "low_magic": _MAGIC + (half - (0 if signed else 8 * step)).astype(jnp.float32),
    "next_shift": shift,
  }


def store(
  sums: Array, vectors: dict[str, Any], out: Any, part: Any, activation: str, erf: bool = False
) -> None:
  """Writes some rows of a tile as int32 sums or real values."""
  if out.dtype == jnp.int32:
    out[part] = sums
  else:
    y = _real(sums, vectors)
    if activation == "gelu":
      y = gelu(y, erf) * (1 / _factors(erf)[1])
    else:
      y = lower.activate(y, activation)
    out[part] = y.astype(out.dtype)


def requantize(tile: Tile, out8: Any, out4: Any) -> None:
  """Writes a tile as the next layer's codes, each output in the precision that it has there."""
  n = out8.shape[1]
  if tile.strip == n:
    _requantize_strip(tile, out8, out4, pl.ds(0, n), tile.start)
    return

  def strip(i, _):
    first = pl.multiple_of(i * tile.strip, tile.strip)
    _requantize_strip(tile, out8, out4, pl.ds(first, tile.strip), tile.start + first)

  jax.lax.fori_loop(0, n // tile.strip, strip, None)


def _requantize_strip(tile: Tile, out8: Any, out4: Any, columns: Any, start: Array) -> None:
  m, stop = out8.shape[0], start + tile.strip
  end, begin = tile.written
  v = {name: vector.at[:, columns] for name, vector in tile.vectors.items()}
  most = float(quantizer.code_range(8, tile.signed)[1])
  magic = _MAGIC - (0 if tile.signed else 128)

  def write(rows, low: bool, high: bool):
    y = tile.steps(rows, columns)
    place = start + jax.lax.broadcasted_iota(jnp.int32, y.shape, 1)
    if high:
      x8 = rounded_bits(jnp.clip(y, float(tile.least), most), magic)
      x8 = jnp.where(place < tile.boundary, 0, x8) if low else x8
      out8[rows, columns] = x8.astype(jnp.int8)
    if low:
      limited = jnp.minimum(jnp.maximum(y, v["low_least"][...]), v["low_most"][...])
      x4 = rounded_bits(limited, v["low_magic"][...]) >> v["next_shift"][...]
      x4 = jnp.where(place < tile.boundary, x4, 0) if high else x4
      out4[rows, columns] = x4.astype(jnp.int4)

  def all_rows(low: bool, high: bool):
    write_all = functools.partial(write, low=low, high=high)
    return lambda: each(m, tile.strip, write_all, tile.turn, tile.parts)

  def clear(out: Any):
    """A precision that is not used here, and that the next layer reads around its boundary."""

    def zero(rows):
      out[rows, columns] = jnp.zeros((rows.size, tile.strip), out.dtype)

    return lambda: each(m, tile.strip, zero)

  is_low, is_high = stop <= tile.boundary, start >= tile.boundary
  pl.when(is_high)(all_rows(low=False, high=True))
  pl.when(is_low)(all_rows(low=True, high=False))
  pl.when(~is_low & ~is_high)(all_rows(low=True, high=True))
  pl.when(is_high & (start < end))(clear(out4))
  pl.when(is_low & (stop > begin))(clear(out8))


def each(
  m: int,
  n: int,
  write: Callable[[Any], None],
  turn: int = 0,
  parts: tuple[tuple[int, int], ...] = (),
) -> None:
  """Calls `write` for slices of m rows of n columns, in a loop: the code is long enough."""
  size = turn or epilogue_rows(m, n)

  def step(i, _):
    for first, rows in parts or ((0, size),):
      write(pl.ds(pl.multiple_of(i * size + first, 64), rows))

  jax.lax.fori_loop(0, m // size, step, None)


def epilogue_rows(m: int, n: int, beside: bool = False) -> int:
  """Rows that one turn of `each` takes: up to 2^18 values, half as many more beside products."""
  most = 3 * 2**17 if beside else 2**18
  sizes = [size for size in range(64, m + 1, 64) if m % size == 0 and size * n <= most]
  return max(sizes, default=64)


def _real(sums: Array, vectors: dict[str, Any]) -> Array:
  y = sums.astype(jnp.float32) * vectors["scale"][...]
  return y + vectors["bias"][...] if "bias" in vectors else y


def scaled(sums: Array, vectors: dict[str, Any], activation: str, erf: bool = False) -> Array:
  """Integer sums -> results in steps of the next layer's scale, float32."""
  y, inverse = _real(sums, vectors), vectors["inverse"]
  if activation == "relu6":
    y = jnp.minimum(y, 6 * inverse[...])
  if _linear(activation):
    return y
  return (gelu(y, erf) if activation == "gelu" else lower.activate(y, activation)) * inverse[...]


def rounded_bits(y: Array, magic: Any = _MAGIC) -> Array:
  """The pattern of y rounded half to even, an int32 above `_MAGIC_BITS` by its value.

  A whole number may be added to `magic`; where it is odd, ties go the other way.
  """
  return jax.lax.bitcast_convert_type(y + jnp.asarray(magic, jnp.float32), jnp.int32)


def rounded(y: Array) -> Array:
  """Rounded half to even, int32; for magnitudes below 2^22."""
  return rounded_bits(y) - _MAGIC_BITS


def gelu(r: Array, erf: bool = False) -> Array:
  """`d GELU(r / c)`, (c, d) of `_factors`.

  Without erf in hardware c = d = sqrt(log2(e) / 2), to within 1e-6; cheaper than by the compiler's
  erf. With Abramowitz and Stegun's 7.1.26, `erf(z) = 1 - P(1 / (1 + p z)) exp(-z^2)` for z >= 0
  (error below 1.5e-7), both signs are `max(y, 0) - |y| P exp(-y^2 / 2) / 2`;
  `exp(-y^2 / 2) = 2^(-r^2)`.
  """
  if erf:
    return r + r * jax.lax.erf(r)
  size = jnp.abs(r)
  below = 1 + jnp.float32(0.3275911 * 0.5**0.5 / _GELU_ROOT) * size
  t = pl.reciprocal(below, approx=True)
  t = t * (2 - below * t)  # Newton's step makes the hardware's estimate a float32
  p = jnp.float32(0.5 * 1.061405429)
  for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
    p = p * t + jnp.float32(0.5 * c)
  return jnp.maximum(r, 0) - size * (p * t) * jnp.exp2(-(r * r))


def _factors(erf: bool) -> tuple[float, float]:
  """What GELU's operand and its result are multiplied by, for the cheapest form of it."""
  return (math.sqrt(0.5), math.sqrt(2)) if erf else (_GELU_ROOT, _GELU_ROOT)


def _linear(activation: str) -> bool:
  """Whether scaling may be moved in front of it (scales are positive)."""
  return activation in ("none", "relu", "relu6")
