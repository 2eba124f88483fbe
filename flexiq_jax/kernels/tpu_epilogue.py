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


def store(tile: Tile, out: Any, rows: list[Any], activation: str) -> None:
  """Writes a tile as int32 sums or real values."""
  for part in rows:
    if out.dtype == jnp.int32:
      out[part] = tile.sums[part]
    else:
      out[part] = _activate(_real(tile, part), activation).astype(out.dtype)


def requantize(
  tile: Tile, out8: Any, out4: Any, rows: list[Any], activation: str, signed: bool
) -> None:
  """Writes a tile as the next layer's codes, each output in the precision that it has there."""
  stop = tile.start + out8.shape[1]
  end, begin = tile.written
  shift = tile.vectors["next_shift"]

  def write(low: bool, high: bool) -> None:
    for part in rows:
      codes = _codes(tile, part, activation, signed)
      place = tile.start + jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
      if high:
        x8 = codes if signed else codes - 128
        out8[part] = (jnp.where(place < tile.boundary, 0, x8) if low else x8).astype(jnp.int8)
      if low:
        x4 = lowering.lower_activations(codes, jnp.broadcast_to(shift[...], codes.shape), signed)
        x4 = x4 if signed else x4 - 8
        out4[part] = (jnp.where(place < tile.boundary, x4, 0) if high else x4).astype(jnp.int4)

  def clear(out: Any) -> None:
    """A precision that the tile does not use, and the next layer reads around its boundary."""
    for part in rows:
      out[part] = jnp.zeros_like(out[part])

  is_low, is_high = stop <= tile.boundary, tile.start >= tile.boundary
  pl.when(is_high)(lambda: write(low=False, high=True))
  pl.when(is_low)(lambda: write(low=True, high=False))
  pl.when(~is_low & ~is_high)(lambda: write(low=True, high=True))
  pl.when(is_high & (tile.start < end))(lambda: clear(out4))
  pl.when(is_low & (stop > begin))(lambda: clear(out8))


def _real(tile: Tile, part) -> Array:
  y = tile.sums[part].astype(jnp.float32) * tile.vectors["scale"][...]
  return y + tile.vectors["bias"][...] if "bias" in tile.vectors else y


def _codes(tile: Tile, part, activation: str, signed: bool) -> Array:
  """int32 8-bit codes of the next layer."""
  lo, hi = quantizer.code_range(8, signed)
  y, inverse = _real(tile, part), tile.vectors["inverse"]
  if activation == "relu6":
    y = jnp.minimum(y, 6 * inverse[...])
  if _linear(activation):
    lo = lo if activation == "none" else 0
  else:
    y = _activate(y, activation) * inverse[...]
  y = jnp.clip(y, float(lo), float(hi)) + jnp.float32(_MAGIC)
  return jax.lax.bitcast_convert_type(y, jnp.int32) - _MAGIC_BITS


def _activate(y: Array, activation: str) -> Array:
  if activation == "gelu":  # the compiler knows erf, not the erfc of jax.nn.gelu
    return 0.5 * y * (1 + jax.lax.erf(y * jnp.float32(0.5**0.5)))
  return lower.activate(y, activation)


def _linear(activation: str) -> bool:
  """Whether scaling may be moved in front of it (scales are positive)."""
  return activation in ("none", "relu", "relu6")
