"""The mixed matmul on Hopper GPUs: operands as the kernel of `hopper` takes them.

`prepare` lays weights out once, K along the rows of both precisions, since wgmma takes int8 only
so. Packed bytes pair rows of K that are 64 apart, not neighbours: a byte's two nibbles then belong
to the same place of two tiles, and no code changes its lane.

    y = sum_k x_low[m, k] (w4[n, k] << e[k, n])  +  sum_k x8[m, k] w8[n, k]

x_low is the activations' 4-bit codes shifted back (`x4 << shift` fits int8, for static and for
run-time shifts), made in one elementwise pass that XLA fuses with what precedes it. What 4 bits
save on Hopper is the reading of weights; an activation stays one byte. The kernel reads each K tile
in the precision that is in use, the tile that holds the boundary in both.

With unsigned codes and run-time shifts x_low is `((x4 + 8) << shift) - 128`, which fits int8 too;
the 128 comes back as a constant for each output, whatever the shifts.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import lax

from flexiq_jax.kernels import lower, packing
from flexiq_jax.kernels.gpu import hopper
from flexiq_jax.kernels.gpu.hopper import HALF
from flexiq_jax.kernels.gpu.tiling import STRIP, TILE_K, Tiles, check_tiles, choose_tiles
from flexiq_jax.kernels.operands import Activations, Epilogue, Requantize, Weights
from flexiq_jax.quant import lowering, quantizer

Array = Any


@struct.dataclass
class GpuWeights:
  """Weights as the kernel reads them, K' and N' being K and N padded to whole tiles.

  Attributes:
    w8: int8 `[N', K']`.
    w4: int32 `[N', K'/8]`, words of packed bytes; byte c of tile t holds rows `128 t + c` (low
      nibble) and `128 t + 64 + c` (high nibble).
    shift: int8 `[K'/64, N']`, extraction shift of each half tile.
    x_shift, block, offset: as in `Weights`.
    n: N.
  """

  w8: Array
  w4: Array
  shift: Array
  x_shift: Array
  block: int = struct.field(pytree_node=False)
  offset: int = struct.field(pytree_node=False)
  n: int = struct.field(pytree_node=False)

  @property
  def taps(self) -> int:
    """As in `Weights`; this kernel takes patches."""
    return 1

  @property
  def steps(self) -> int:
    """As in `Weights`."""
    return 1


def prepare(w: Weights) -> GpuWeights:
  """Lays a layer's weights out for the kernel; once, when a model is deployed.

  Raises:
    NotImplementedError: shift blocks that do not consist of half tiles, or weights laid out for
      a window that slides.
  """
  if w.taps > 1:
    raise NotImplementedError(f"taps: {w.taps}; the GPU kernel takes patches, which have 1")
  if w.block % HALF:
    raise NotImplementedError(
      f"block: {w.block} rows in a shift block; the GPU kernel takes multiples of {HALF} (see "
      "shift_block), the reference takes any"
    )
  k, n = w.w8.shape
  size = (_up(k, TILE_K), _up(n, STRIP))
  halves = _pad(packing.unpack(w.w4), size).reshape(-1, 2, HALF, size[1])
  byte = (halves[:, 0] & 15) | (halves[:, 1] << 4)
  words = byte.reshape(-1, size[1]).T.reshape(size[1], -1, 4)
  shift = jnp.repeat(w.w_shift.astype(jnp.int8), w.block // HALF, axis=0)
  return GpuWeights(
    w8=_pad(w.w8, size).T,
    w4=lax.bitcast_convert_type(words, jnp.int32),
    shift=_pad(shift, (size[0] // HALF, size[1])),
    x_shift=w.x_shift,
    block=w.block,
    offset=w.offset,
    n=n,
  )


def mixed_matmul(
  x: Activations,
  w: Weights | GpuWeights,
  epilogue: Epilogue,
  *,
  tiles: Tiles | None = None,
  interpret: Any = False,
) -> Array | Activations:
  """See `api.mixed_matmul`.

  Rows are padded to whole tiles here, which copies x8 where M is no multiple of the tile.

  Args:
    x: activations; where a producer skips what is not read (`Requantize.granule`), it writes whole
      multiples of 128 channels.
    w: weights; `Weights` are prepared on the spot, at every call.
    epilogue: what follows the integer sum.
    tiles: block sizes; None chooses.
    interpret: parameters of JAX's interpreter of GPU kernels (`InterpretGPUParams`), to run on a
      CPU; True is not enough.

  Raises:
    NotImplementedError: `interpret=True`, or what `prepare` refuses.
    ValueError: tiles that do not divide the outputs or do not fit into shared memory.
  """
  if interpret is True:
    raise NotImplementedError(
      "interpret: True; the GPU kernel takes the parameters of JAX's interpreter of GPU kernels "
      "(InterpretGPUParams)"
    )
  if isinstance(w, Weights):
    w = prepare(w)
  n, k = w.w8.shape
  dtypes = ("int8", "int8") if epilogue.requantize is not None else (epilogue.out,)
  tiles = tiles or choose_tiles(x.x8.shape[0], n)
  check_tiles(tiles, n)
  size = (_up(x.x8.shape[0], tiles.m), k)
  names, vectors = _vectors(x, w, epilogue)
  outputs = hopper.mixed(
    x.boundary[None],
    _pad(_shifted_back(x, w), size),
    _pad(x.x8, size),
    w.w4,
    w.w8,
    w.shift,
    tuple(_pad(v, (n,)) for v in vectors),
    finish=lambda acc, *rows: _finish(acc, dict(zip(names, rows, strict=True)), epilogue),
    dtypes=dtypes,
    tiles=tiles,
    interpret=interpret,
  )
  outputs = [y[: x.x8.shape[0], : w.n] for y in outputs]
  if epilogue.requantize is None:
    return outputs[0]
  x8, x4 = outputs
  return Activations(x8=x8, x4=x4.astype(jnp.int4), boundary=epilogue.requantize.boundary)


def _shifted_back(x: Activations, w: GpuWeights) -> Array:
  """int8 `[M, K]`: 4-bit codes in 8-bit steps, zero from the boundary on."""
  m, k = x.x4.shape
  shift = w.x_shift[None] if x.row_shift is None else x.row_shift
  codes = x.x4.astype(jnp.int32).reshape(m, -1, w.block)
  if x.row_shift is not None and w.offset:
    codes = ((codes + 8) << shift[:, :, None]) - 128
  else:
    codes = codes << shift[:, :, None]
  low = jnp.arange(k, dtype=jnp.int32) < x.boundary
  return jnp.where(low[None], codes.reshape(m, k), 0).astype(jnp.int8)


def _vectors(x: Activations, w: GpuWeights, epilogue: Epilogue) -> tuple[list[str], list[Array]]:
  """Names and values `[N]` of what the epilogue reads."""
  correction = epilogue.correction
  if x.row_shift is not None and w.offset:
    correction = correction + 128 * _low_sums(w, x.boundary)[: w.n]
  values = {"correction": correction}
  if epilogue.out != "int32":
    values["scale"] = epilogue.scale
    if epilogue.bias is not None:
      values["bias"] = epilogue.bias
    if (r := epilogue.requantize) is not None:
      low = jnp.arange(w.n, dtype=jnp.int32) < r.boundary
      values["next_shift"] = jnp.where(low, r.shift, -1)  # -1: stays in 8 bits
      values["next_scale"] = jnp.broadcast_to(r.scale, (w.n,))
  return list(values), list(values.values())


def _low_sums(w: GpuWeights, boundary: Array) -> Array:
  """int32 `[N']`: sums of the 4-bit weights below the boundary, shifted back."""
  n, k = w.w8.shape
  byte = lax.bitcast_convert_type(w.w4, jnp.int8).reshape(n, -1, 1, HALF).astype(jnp.int32)
  codes = jnp.concatenate([((byte & 15) ^ 8) - 8, byte >> 4], axis=2)
  codes = codes << w.shift.T.astype(jnp.int32).reshape(n, -1, 2, 1)
  low = jnp.arange(k, dtype=jnp.int32) < boundary
  return jnp.where(low[None], codes.reshape(n, k), 0).sum(axis=1)


def _finish(acc: Array, rows: dict[str, Array], epilogue: Epilogue) -> tuple[Array, ...]:
  """`lower.finish` on a tile in registers, in operations that Mosaic GPU has."""
  acc = acc + rows["correction"]
  if epilogue.out == "int32" and epilogue.requantize is None:
    return (acc,)
  y = acc.astype(jnp.float32) * rows["scale"]
  if "bias" in rows:
    y = y + rows["bias"]
  if epilogue.activation == "gelu":
    y = 0.5 * y * (1.0 + _erf(y * 0.5**0.5))
  else:
    y = lower.activate(y, epilogue.activation)
  if epilogue.requantize is None:
    return (y.astype(epilogue.out),)
  return _requantized(y, rows, epilogue.requantize)


def _erf(x: Array) -> Array:
  """The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26); Mosaic GPU lowers none."""
  z = jnp.abs(x)
  t = 1.0 / (1.0 + 0.3275911 * z)
  tail = jnp.zeros_like(t)
  for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
    tail = (tail + a) * t
  value = 1.0 - tail * jnp.exp(-z * z)
  return jnp.where(x < 0, -value, value)


def _requantized(y: Array, rows: dict[str, Array], r: Requantize) -> tuple[Array, Array]:
  """int8 codes of both precisions, each zero where the other is in use."""
  codes = quantizer.quantize(y, rows["next_scale"], 8, r.signed)
  low = rows["next_shift"] >= 0
  q4 = lowering.lower_activations(codes, jnp.maximum(rows["next_shift"], 0), r.signed)
  if not r.signed:
    codes, q4 = codes - 128, q4 - 8
  zero = jnp.zeros_like(codes)
  return jnp.where(low, zero, codes).astype(jnp.int8), jnp.where(low, q4, zero).astype(jnp.int8)


def _up(size: int, granule: int) -> int:
  return -(-size // granule) * granule


def _pad(a: Array, shape: tuple[int, ...]) -> Array:
  """`a` with zeros after it, up to `shape`."""
  widths = [(0, to - size) for size, to in zip(a.shape, shape, strict=True)]
  return jnp.pad(a, widths) if any(after for _, after in widths) else a
