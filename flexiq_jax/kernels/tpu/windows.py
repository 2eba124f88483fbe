"""Patches of a convolution, made on the way into the matrix unit: im2col that is never written.

A tile of rows of x comes once; each window position of it is the same rows, some further. Rows lie
packed in words of 32 bits, four or eight of them, so a position is two words shifted into one:

    out[q] = words[q + a] >> 8 b  |  words[q + a + 1] << (32 - 8 b),   4 a + b rows further

Beyond the border of an image the code of zero takes its place, by masks of the pixels whose
neighbour (up, down, left, right) is missing. A register of patches takes some six operations, fewer
than there are slots beside its products with 128 outputs.

Tiles are whole images, or whole parts of one image with a margin of the rows around them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels.tpu.sweeps import Sweep
from flexiq_jax.kernels.tpu.tiling import LANES, ROWS, div
from flexiq_jax.kernels.windows import neighbours

Array = Any
_ZEROS = {8: -0x7F7F7F80, 4: -0x77777778}  # words of -128 and of -8, what unsigned zeros became


def masks(sweep: Sweep) -> tuple[Array, Array]:
  """Which pixels have their neighbours, as words of 8-bit and of 4-bit codes.

  Returns:
    int32 `[D, rows / 4, LANES]` and `[D, rows / 8, LANES]` for the D steps up, down, left or right
    that positions of the window make, all bits of a row that has the neighbour set.
  """
  window = sweep.window
  assert window is not None
  _, inside = neighbours(window, sweep.tiles.m * sweep.period)
  made = []
  for bits in (8, 4):
    per = 32 // bits
    place = bits * np.arange(per, dtype=np.uint32)
    ones = np.uint32(2**bits - 1) << place
    words = np.where(inside.reshape(len(inside), -1, per), ones, np.uint32(0)).sum(axis=2)
    words = jnp.asarray(words.astype(np.uint32).view(np.int32))[:, :, None]
    made.append(jnp.broadcast_to(words, (*words.shape[:2], LANES)))
  return made[0], made[1]


def mask_specs(sweep: Sweep) -> list[pl.BlockSpec]:
  """How a step of the grid takes its masks."""
  window = sweep.window
  assert window is not None
  count = len(neighbours(window, 1)[0])
  index = lambda i, *_: (0, jax.lax.rem(i, sweep.period), 0)
  return [pl.BlockSpec((count, sweep.tiles.m // per, LANES), index) for per in (4, 8)]


def words_shape(sweep: Sweep) -> tuple[int, int, int]:
  """Shape of the scratch memory that holds a tile of a block, with its margins, as words."""
  return sweep.columns // LANES, (sweep.tiles.m + 2 * sweep.margin) // 4, LANES


def stage_rows(m: int) -> int:
  """Rows that one turn of `stage` takes, of a tile of m."""
  return max(t for t in range(ROWS, min(512, m) + 1, ROWS) if m % t == 0)


def stage(sweep: Sweep, tile: Any, words: Any) -> None:
  """Copies a tile as words, which may be read from any of them on.

  Args:
    sweep: the kernel.
    tile: `[margin + m + margin, S]` codes.
    words: scratch memory of `words_shape`.
  """
  per = 32 // jnp.iinfo(tile.dtype).bits
  m, turn = sweep.tiles.m, stage_rows(sweep.tiles.m)

  def copy(row, rows):
    to = pl.ds(pl.multiple_of(div(row, per), ROWS // per), rows // per)
    for c in range(sweep.columns // LANES):
      codes = tile[pl.ds(pl.multiple_of(row, ROWS), rows), pl.ds(c * LANES, LANES)]
      words[c, to] = pltpu.bitcast(codes, jnp.int32)

  if sweep.halo:
    copy(0, sweep.margin)
    copy(sweep.margin + m, sweep.margin)
  jax.lax.fori_loop(0, m // turn, lambda i, _: copy(sweep.margin + i * turn, turn), None)


def patches(
  sweep: Sweep, dtype: Any, words: Any, mask: Any, block: Any, boundary: Array, rows: Any
) -> Array:
  """The patches of some rows of a staged tile, `[rows, block]` codes.

  They are made as the matrix unit takes them, beside its work: nothing is written.

  Args:
    sweep: the kernel.
    dtype: int4 or int8.
    words: where the tile is staged.
    mask: of `masks`, for this type.
    block: the shift block's number.
    boundary: how many columns of x are in 4 bits.
    rows: the slice of rows, whole register tiles.
  """
  window, bits = sweep.window, jnp.iinfo(dtype).bits
  assert window is not None
  per = 32 // bits
  steps, _ = neighbours(window, 1)
  size, start = rows.size // per, div(rows.start, per)
  first = sweep.margin // per + start
  at = pl.ds(pl.multiple_of(start, ROWS // per), size)

  def moved(c, distance):
    """Words of the same rows, some further."""
    ahead, rest = divmod(distance, per)
    here = words[c, pl.ds(first + ahead, size)]
    if not rest:
      return here
    behind = words[c, pl.ds(first + ahead + 1, size)]
    here = jax.lax.shift_right_logical(here, jnp.int32(bits * rest))
    return here | (behind << (32 - bits * rest))

  def border(c):
    """The code of zero in this precision; zero bits in the columns of the other precision."""
    place = block * sweep.columns + c * LANES
    place += jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
    here = place < boundary if bits == 4 else place >= boundary
    return jnp.where(here, jnp.int32(_ZEROS[bits]), 0)

  count, copies = sweep.columns // LANES, sweep.copies
  borders = [border(c) for c in range(count)] if sweep.unsigned else []
  turn = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1) & (copies - 1)
  positions = [*zip(window.offsets, window.rows, strict=True)]

  def seen(c, offset, distance):
    """Words as one window position sees them."""
    codes = moved(c, distance)
    known = [mask[steps.index((axis, d)), at] for axis, d in enumerate(offset) if d]
    if not known:
      return codes
    inside = functools.reduce(jnp.bitwise_and, known)
    return ((codes ^ borders[c]) & inside) ^ borders[c] if sweep.unsigned else codes & inside

  pieces = []
  for step in range(0, len(positions), copies):
    for c in range(count):
      codes = seen(c, *positions[step])
      for i, position in enumerate(positions[step + 1 : step + copies], 1):
        codes = jnp.where(turn == i, seen(c, *position), codes)
      pieces.append(pltpu.bitcast(codes, dtype))
  return jnp.concatenate(pieces, axis=1)
