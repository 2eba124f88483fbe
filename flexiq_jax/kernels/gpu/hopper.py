"""The mixed matmul's kernel on Mosaic GPU, for Hopper (sm_90a).

A tensor core of Hopper multiplies int8 and nothing narrower. A 4-bit code shifted back, `w4 << e`,
fits int8, so weights are read packed, and widened and shifted on their way to the tensor core. The
shift belongs to a whole word of four weights there and costs one instruction. After the product it
would cost one for every entry of the accumulator and break the run of products that share it. One
int32 accumulator then takes all of K, and is exact.

| warpgroup | does |
|---|---|
| the last | copies tiles into a ring of buffers: K tiles below the boundary packed, then those from
  it on in 8 bits; the tile that holds it both ways, each x with zeros on the other's side |
| the others | each a strip of the tile's columns: widen, multiply, finish, store |

Widening, for four nibbles t in the low halves of a word's bytes (two's complement, sign bit 8):

    (t & 7) << e  |  (t & 8) * (32 - 2^e)  =  t << e     in each byte, which never carries into the
                                                         next: at most 112, and at most 8 * 31
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flexiq_jax.kernels.gpu.tiling import ROW, TILE_K, Tiles

Array = Any
Ref = Any

HALF = TILE_K // 2  # rows whose nibbles share a side of the bytes; width of the swizzle in bytes


def mixed(
  boundary: Array,
  x_low: Array,
  x_high: Array,
  w4: Array,
  w8: Array,
  shift: Array,
  vectors: tuple[Array, ...],
  *,
  finish: Callable[..., tuple[Array, ...]],
  dtypes: tuple[str, ...],
  tiles: Tiles,
  interpret: Any = False,
) -> tuple[Array, ...]:
  """`finish(x_low @ (w4 << shift) + x_high @ w8)`, everything in whole tiles.

  Args:
    boundary: int32 `[1]`, rows of K below it are read from x_low and w4, the others from x_high and
      w8.
    x_low: int8 `[M, K]`, 4-bit codes shifted back; zero from the boundary on.
    x_high: int8 `[M, K]`, zero below the boundary.
    w4: int32 `[N, K/8]`, byte c of tile t holds rows `128 t + c` (low nibble) and `128 t + 64 + c`.
    w8: int8 `[N, K]`.
    shift: int8 `[K/64, N]`.
    vectors: what `finish` needs, at least one: int32 or float32 `[N]` each.
    finish: int32 `[tiles.m, tiles.n / groups]` and the vectors, spread over that shape -> results
      of that shape.
    dtypes: of the results, all the same.
    tiles: block sizes; tiles.m divides M and tiles.n divides N.
    interpret: parameters of the interpreter, which has neither transposed nor bitcast references:
      with it the operand of a product is made by value.

  Returns:
    A `[M, N]` for each of `dtypes`.
  """
  m, n = x_low.shape[0], w8.shape[0]
  groups, strip = tiles.groups, tiles.n // tiles.groups

  def kernel(*refs):
    inputs, outputs, scratch = refs[:7], refs[7 : 7 + len(dtypes)], refs[7 + len(dtypes) :]
    _kernel(inputs, outputs, *scratch, finish=typed, tiles=tiles, interpret=bool(interpret))

  def typed(acc, *rows):
    pairs = zip(rows, vectors, strict=True)
    return finish(acc, *(lax.bitcast_convert_type(row, v.dtype) for row, v in pairs))

  params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
  run = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct((m, n), jnp.dtype(d)) for d in dtypes],
    scratch_types=_scratch(tiles, strip, dtypes[0], len(vectors), bool(interpret)),
    grid=(n // tiles.n, m // tiles.m),
    grid_names=("n", "m"),
    num_threads=groups + 1,
    thread_name="group",
    compiler_params=params,
    interpret=interpret,
  )
  bits = jnp.stack([lax.bitcast_convert_type(v, jnp.int32) for v in vectors])
  return tuple(run(boundary, x_low, x_high, w4, w8, shift, bits))


def _scratch(tiles: Tiles, strip: int, dtype: str, vectors: int, interpret: bool) -> list[Any]:
  """Buffers in shared memory and barriers, in the order `_kernel` takes them."""
  ring, groups, itemsize = tiles.buffers, tiles.groups, jnp.dtype(dtype).itemsize
  columns = math.gcd(strip, ROW // itemsize)  # of a result, staged at a time
  # Weights are widened where they lie, as words, and multiplied as bytes: one buffer, two views of
  # equal strides. Results are staged where the epilogue's vectors were. The interpreter has no
  # unions: there the views are buffers.
  union = (lambda *refs: refs) if interpret else plgpu.RefUnion
  buffers = [
    _tiled((ring, tiles.m, TILE_K), "int8"),
    union(
      _tiled((ring, groups, 2, strip, HALF), "int8"),
      _tiled((ring, groups, 2, strip, HALF // 4), "int32"),
    ),
    plgpu.SMEM((ring, groups, 2, strip), jnp.int8),
    union(
      _tiled((groups, tiles.m, columns), dtype, ROW),
      plgpu.SMEM((groups, tiles.m * columns * itemsize // 4), jnp.int32),
    ),
    plgpu.Barrier(num_arrivals=vectors * groups),
    plgpu.Barrier(num_arrivals=1 + 2 * groups, num_barriers=ring),
    plgpu.Barrier(num_arrivals=1 + 2 * groups, num_barriers=ring),
    plgpu.Barrier(num_arrivals=groups, num_barriers=ring),
  ]
  if interpret:
    buffers.append(plgpu.SMEM((groups, HALF, strip), jnp.int8))
  return buffers


def _tiled(shape: tuple[int, ...], dtype: str, swizzle: int = HALF) -> Any:
  """A buffer in the tiled, swizzled layout of tensor core operands."""
  width = min(swizzle, shape[-1] * jnp.dtype(dtype).itemsize)
  tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))
  return plgpu.SMEM(shape, jnp.dtype(dtype), transforms=(tiling, plgpu.SwizzleTransform(width)))


def _kernel(
  inputs, outputs, x_ring, w_ring, e_ring, ends, ready, low_full, high_full, free,
  *by_value,
finish, tiles, interpret,
):  # fmt: skip
  boundary, x_low, x_high, w4, w8, shift, vectors = inputs
  (codes, words), (staged, rows_of_vectors) = w_ring, ends
  ring, groups, strip = tiles.buffers, tiles.groups, tiles.n // tiles.groups
  group = lax.axis_index("group")
  rows = pl.ds(lax.axis_index("m") * tiles.m, tiles.m)
  strips = lax.axis_index("n") * groups
  limit = boundary[0]
  lows = lax.div(limit + (TILE_K - 1), TILE_K)
  first = lax.div(limit, TILE_K)  # the first tile that is read in 8 bits
  steps = lows + x_low.shape[1] // TILE_K - first

  @pl.when(group == groups)
  def copy():
    plgpu.set_max_registers(40, action="decrease")
    for i in range(vectors.shape[0]):
      for g in range(groups):
        row = vectors.at[i, pl.ds((strips + g) * strip, strip)]
        plgpu.copy_gmem_to_smem(row, rows_of_vectors.at[g, pl.ds(i * strip, strip)], ready)

    def wait(t):
      @pl.when(t >= ring)
      def wait_until_read():
        plgpu.barrier_wait(free.at[lax.rem(t, ring)])

      return lax.rem(t, ring)

    def low(t, carry):
      slot = wait(t)
      full = low_full.at[slot]
      plgpu.copy_gmem_to_smem(x_low.at[rows, pl.ds(t * TILE_K, TILE_K)], x_ring.at[slot], full)
      for g in range(groups):
        columns = pl.ds((strips + g) * strip, strip)
        packed = pl.ds(t * (HALF // 4), HALF // 4)
        plgpu.copy_gmem_to_smem(w4.at[columns, packed], words.at[slot, g, 0], full)
        plgpu.copy_gmem_to_smem(shift.at[pl.ds(2 * t, 2), columns], e_ring.at[slot, g], full)
      return carry

    def high(t, carry):
      slot = wait(t)
      full, tile = high_full.at[slot], t - lows + first
      plgpu.copy_gmem_to_smem(x_high.at[rows, pl.ds(tile * TILE_K, TILE_K)], x_ring.at[slot], full)
      for g in range(groups):
        columns = pl.ds((strips + g) * strip, strip)
        for half in range(2):
          k = pl.ds(tile * TILE_K + half * HALF, HALF)
          plgpu.copy_gmem_to_smem(w8.at[columns, k], codes.at[slot, g, half], full)
      return carry

    def drain(t, carry):
      plgpu.barrier_wait(free.at[lax.rem(t, ring)])
      return carry

    lax.fori_loop(0, lows, low, None)
    lax.fori_loop(lows, steps, high, None)
    lax.fori_loop(jnp.maximum(steps - ring, 0), steps, drain, None)

  def multiply(total, slot, weights):
    """Adds a step's product; K runs along the rows of the weights, as wgmma takes int8."""
    for half in range(2):
      x, w = x_ring.at[slot, :, pl.ds(half * HALF, HALF)], weights.at[slot, group, half]
      if interpret:
        value = w[...]
        if value.dtype == jnp.int32:
          value = lax.bitcast_convert_type(value, jnp.int8).reshape(strip, HALF)
        by_value[0][group] = value.T
        plgpu.wgmma(total, x, by_value[0].at[group])
      else:
        plgpu.wgmma(total, x, w.transpose((1, 0)))

  def release(t):
    """Waits for the products of the step before t: its buffers may be filled again."""
    plgpu.wgmma_wait(2)  # the two of step t may still run

    @pl.when(t > 0)
    def arrive():
      plgpu.barrier_arrive(free.at[lax.rem(t - 1, ring)])

  def products(total):
    def low(t, carry):
      slot = lax.rem(t, ring)
      plgpu.barrier_wait(low_full.at[slot])
      packed = words[slot, group, 0]
      shifts = [e_ring[slot, group, half].astype(jnp.int32) for half in range(2)]
      plgpu.commit_smem()  # everyone has read before anyone writes over it
      for half in range(2):
        words[slot, group, half] = _widen(packed, shifts[half], half)
      plgpu.commit_smem()
      multiply(total, slot, words if interpret else codes)
      release(t)
      return carry

    def high(t, carry):
      slot = lax.rem(t, ring)
      plgpu.barrier_wait(high_full.at[slot])
      multiply(total, slot, codes)
      release(t)
      return carry

    lax.fori_loop(0, lows, low, None)
    lax.fori_loop(lows, steps, high, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(free.at[lax.rem(steps - 1, ring)])
    return total[...]

  @pl.when(group < groups)
  def compute():
    plgpu.set_max_registers(232, action="increase")
    shape = (tiles.m, strip)
    total = pl.run_scoped(products, plgpu.ACC(shape, jnp.int32))
    plgpu.barrier_wait(ready)
    spread = []
    for i in range(vectors.shape[0]):
      row = rows_of_vectors[group, pl.ds(i * strip, strip)]
      spread.append(lax.broadcast_in_dim(row, shape, (1,)))
    plgpu.commit_smem()  # everyone has read before anyone writes over them
    width = staged.shape[-1]
    for y, out in zip(finish(total, *spread), outputs, strict=True):
      for start in range(0, strip, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[group] = y[:, start : start + width]
        plgpu.commit_smem()
        columns = pl.ds((strips + group) * strip + start, width)
        plgpu.copy_smem_to_gmem(staged.at[group], out.at[rows, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _widen(packed: Array, e: Array, half: int) -> Array:
  """Words of packed nibbles `[n, words]` -> words of int8 `code << e`, e `[n]`."""
  if half:
    packed = lax.shift_right_logical(packed, jnp.full_like(packed, 4))
  e = lax.broadcast_in_dim(e, packed.shape, (0,))
  positive = lax.shift_left(packed & 0x07070707, e)
  return positive | (packed & 0x08080808) * (32 - lax.shift_left(jnp.ones_like(e), e))
