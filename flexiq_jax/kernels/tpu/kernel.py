"""The body of the TPU kernel: copies, products, sums and what they become, for one tile.

What shapes the speed (v5e; `benchmarks/kernels.py` prints the schedules):

* The matrix unit takes 128 rows of K per pass in int8 and 256 in int4. Runs of K that share a shift
  must therefore be 256 long, or 4 bits gain nothing: `block_k` is a multiple of that where K is.
* Filling and draining the unit costs about 140 cycles per block, so tiles are large.
* Windows of a convolution are unfolded on the way into the matrix unit (`windows.py`), or blocks of
  rows are read where they lie (`pixels.py`).
* Reading and writing the accumulator takes one store per register and pass, which an int4 pass just
  hides; the first block starts from the correction, so that nothing has to be zeroed.

On a matrix unit of 256 x 256 (v6e, v7x) a pass takes 256 rows of K in int8 and 512 in int4, and the
vector units limit the speed first:

* The compiler reorders int4 operands, weights anew for each product: there products are long.
* Sums of several runs of K would be held at once, in memory: they are written and read between.
* A K that is no multiple of 256 is one product of whole passes and one of half a pass.
* An epilogue that requantizes runs beside the last block's products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels.tpu import epilogues, pixels, windows
from flexiq_jax.kernels.tpu.sweeps import Sweep
from flexiq_jax.kernels.tpu.tiling import LANES, ROWS, div


def kernel(sweep: Sweep, scalars, x4_hbm, x8_hbm, w4_hbm, w8_hbm, *refs):
  """One step of the grid; `tpu._build` says what its references are."""
  tiles, (steps, _) = sweep.tiles, sweep.grid
  refs, window = list(refs), sweep.window
  shuffles = window is not None and not sweep.innermost
  masks = (refs.pop(0), refs.pop(0)) if shuffles else ()
  row_shift = refs.pop(0) if sweep.dynamic else None
  vectors = {name: refs.pop(0) for name, _ in sweep.vectors}
  words = refs.pop() if shuffles else None
  *outs, x4, x8, w4, w8, acc, x_sems, w_sems = refs
  i, j = pl.program_id(0), pl.program_id(1)
  boundary = scalars[0]
  depth = sweep.columns
  low_end, high_start = div(boundary + depth - 1, depth), div(boundary, depth)
  # Precision -> its operands, its blocks of K, and how many rows of w one of K takes.
  sides = (
    (x4_hbm, x4, w4_hbm, w4, 0, low_end, 2),
    (x8_hbm, x8, w8_hbm, w8, high_start, sweep.blocks, 1),
  )

  def copy_w(side, b):
    _, _, source, target, _, _, packed = sides[side]
    size = tiles.k // packed
    return pltpu.make_async_copy(
      source.at[pl.ds(pl.multiple_of(b * size, size), size)], target.at[b], w_sems.at[side, b]
    )

  def copy_x(side, step, b, act):
    """Starts a copy or waits for it; the last tile of rows may be short."""
    source, target = sides[side][:2]
    columns = pl.ds(pl.multiple_of(b * depth, LANES), depth)
    slot = jax.lax.rem(step, 2)
    semaphore = x_sems.at[side, slot, b]
    if sweep.innermost:
      pixels.copy(sweep, source.at[:, :, :, columns], target.at[slot, b], semaphore, step, act)
      return

    def of(size, ahead=0):
      rows = pl.ds(pl.multiple_of(step * tiles.m + ahead, ROWS), size)
      to = pl.ds(sweep.margin + ahead, size)
      act(pltpu.make_async_copy(source.at[rows, columns], target.at[slot, b, to], semaphore))

    if sweep.halo:
      pl.when(step > 0)(lambda: of(sweep.margin, -sweep.margin))
      pl.when(step < steps - 1)(lambda: of(sweep.margin, tiles.m))

    short = sweep.shape[0] - (steps - 1) * tiles.m
    if short == tiles.m:
      of(tiles.m)
    else:
      pl.when(step < steps - 1)(lambda: of(tiles.m))
      pl.when(step == steps - 1)(lambda: of(short))

  def start_x(step):
    for side, (_, target, _, _, start, end, _) in enumerate(sides):
      jax.lax.fori_loop(
        start, end, lambda b, _, side=side: copy_x(side, step, b, lambda c: c.start()), None
      )
      if sweep.innermost:
        pixels.fill(sweep, target, side, (start, end), boundary, step)

  @pl.when((i == 0) & (j == 0))
  def _():
    start_x(0)
    for side, (*_, start, end, _) in enumerate(sides):
      jax.lax.fori_loop(start, end, lambda b, _, side=side: copy_w(side, b).start(), None)

  @pl.when((i + 1 < steps) & (j == 0))
  def _():
    start_x(i + 1)

  def operand(side, b, rows, at, size):
    """Rows of K of some rows of the tile."""
    if sweep.innermost:
      return pixels.patches(sweep, sides[side][1].at[jax.lax.rem(i, 2), b], rows)
    if window is not None:
      dtype = (jnp.int4, jnp.int8)[side]
      return windows.patches(sweep, dtype, words, masks[1 - side], b, boundary, rows)
    return sides[side][1][jax.lax.rem(i, 2), b, rows, pl.ds(at, size)]

  def ready(side, b):
    """Waits for a block's operands."""
    pl.when(j == 0)(lambda: copy_x(side, i, b, lambda c: c.wait()))
    if shuffles:
      windows.stage(sweep, sides[side][1].at[jax.lax.rem(i, 2), b], words)
    pl.when((i == 0) & (j == 0))(lambda: copy_w(side, b).wait())

  def summed(side, b, rows, columns):
    """The sums with a block's product; the first one met starts from the correction."""
    before = acc[rows, columns]
    if isinstance(b, jax.Array) or b == 0:
      first = jnp.asarray(b == 0) & ((side == 0) | (low_end == 0))
      before = jnp.where(first, vectors["correction"][:, columns], before)
    if side == 1:
      return before + multiply_high(b, rows, columns)
    for at in range(0, tiles.k, run):
      if at and sweep.wide:  # else the compiler holds the sums of all runs at once
        acc[rows, columns] = before
        before = acc[rows, columns]
      before += multiply_low(b, at, rows, columns)
    return before

  def block(side, b, write):
    """Adds a block's product to the sums."""
    ready(side, b)

    def turn(start):
      for first, size in sweep.parts(side, sweep.turn):
        rows = pl.ds(start + first, size)
        write(rows, summed(side, b, rows, pl.ds(0, tiles.n)))

    if sweep.turn == tiles.m:
      turn(0)
    else:
      step = lambda t, _: turn(pl.multiple_of(t * sweep.turn, ROWS))
      jax.lax.fori_loop(0, tiles.m // sweep.turn, step, None)

  def keep(rows, sums):
    acc[rows] = sums

  def outputs(columns):
    start = pl.multiple_of(j * tiles.n + columns.start, LANES)
    return pl.ds(start, columns.size)

  run = min(sweep.block, tiles.k)

  def multiply_low(b, at, rows, columns):
    place = div(b * tiles.k + at, sweep.block)
    packed = w4[b, pl.ds(at // 2, run // 2), outputs(columns)]
    product = _dot(
      operand(0, b, rows, at, run),
      pltpu.bitcast(packed, jnp.int4),
      sweep.interpret,
    )
    if "offsets" in vectors:
      product += vectors["offsets"][pl.ds(place, 1), columns]
    shift = vectors["shift"][pl.ds(place, 1), columns]
    product <<= jnp.broadcast_to(shift, product.shape)
    if row_shift is not None:
      product <<= jnp.broadcast_to(_column(row_shift[rows], place), product.shape)
    return product

  def multiply_high(b, rows, columns):
    x, whole = operand(1, b, rows, 0, tiles.k), tiles.k
    if sweep.wide and sweep.innermost and tiles.k > 256:
      whole -= tiles.k % 256  # half a pass among whole ones would halve them all
    ends = sorted({whole, tiles.k})
    return sum(
      _dot(x[:, start:end], w8[b, pl.ds(start, end - start), outputs(columns)], sweep.interpret)
      for start, end in zip([0, *ends], ends, strict=False)
    )

  def finish(rows, sums):
    epilogues.store(sums, vectors, outs[0], rows, sweep.activation, sweep.wide)

  def requantize(sums, parts=()):
    """Writes codes of `sums(rows, columns)`, of so many rows at once."""
    activation, signed = sweep.activation, bool(sweep.signed)

    def steps_at(rows, columns):
      here = {name: vector.at[:, columns] for name, vector in vectors.items()}
      return epilogues.scaled(sums(rows, columns), here, activation, sweep.wide)

    tile = epilogues.Tile(
      steps=steps_at,
      vectors=vectors,
      strip=sweep.strip,
      start=j * tiles.n,
      boundary=scalars[1],
      written=sweep.written(scalars[1]),
      least=epilogues.least_code(activation, signed),
      signed=signed,
      turn=sweep.finishing,
      parts=parts,
    )
    epilogues.requantize(tile, outs[0], outs[1])

  def last_block(side):
    """The last block, with the epilogue beside the matrix unit."""
    b = sweep.blocks - 1
    if sweep.signed is None:
      block(side, b, finish)
    else:
      ready(side, b)
      parts = sweep.parts(side, sweep.finishing) if sweep.innermost else ()
      requantize(lambda rows, columns: summed(side, b, rows, columns), parts)

  all_low = jnp.equal(high_start, sweep.blocks)
  for side, start, end, last in ((0, 0, low_end, all_low), (1, high_start, sweep.blocks, ~all_low)):
    stop = end - last.astype(jnp.int32) if sweep.fused else end
    body = lambda b, _, side=side: block(side, b, keep)
    jax.lax.fori_loop(start, stop, body, None)
    if sweep.fused:
      pl.when(last)(functools.partial(last_block, side))
  if not sweep.fused:
    requantize(lambda rows, columns: acc[rows, columns])


def _dot(a, b, interpret: bool):
  if interpret:  # XLA on CPU has no int4 product
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (0,)), ((), ())),
    precision=jax.lax.Precision.DEFAULT,  # whatever JAX is set to: Mosaic refuses others
    preferred_element_type=jnp.int32,
  )


def _column(table, place):
  """Column `place` (known at run time) of `[rows, J]`, as `[rows, 1]`."""
  here = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) == place
  return jnp.where(here, table, 0).sum(axis=1, keepdims=True)
