"""Patches of a convolution whose images are innermost: blocks of rows, read where they lie.

Rows of x are pixels of all images, one pixel after the other. A window position of a pixel is then
a whole block of rows some blocks further: it goes into the matrix unit from where it lies, without
any shuffle. A tile is some lines of pixels, kept with the pixels around it:

    . . . . . .    above: the line before, or the code of zero at the border of the image
    . 0 1 2 3 .    left and right: always the code of zero
    . 4 5 6 7 .
    . . . . . .    below

so that no position needs a mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels.tpu.sweeps import Sweep
from flexiq_jax.kernels.tpu.tiling import ROWS, borders, div

Array = Any


def shape(sweep: Sweep) -> tuple[int, int, int, int]:
  """Of all of x: lines, pixels of a line, images, columns."""
  window = sweep.window
  assert window is not None
  return window.height, window.width, window.images, sweep.shape[1] // sweep.steps


def copy(sweep: Sweep, source: Any, target: Any, semaphore: Any, step: Any, act: Any) -> None:
  """Starts the copy of a tile's pixels or waits for it: those that are there.

  Args:
    sweep: the kernel.
    source: `[H, W, images, S]`, a block's columns of x.
    target: `[lines, W, images, S]`, a tile with the pixels around it.
    semaphore: of the copy.
    step: the tile's number.
    act: what is done with the copy.
  """
  window, (steps, _) = sweep.window, sweep.grid
  assert window is not None
  above, below, left, _ = borders(window)
  lines = sweep.tiles.m // sweep.line

  def of(first: int, count: int):
    """Copies lines from the `first` on, counted from the tile's own."""
    act(
      pltpu.make_async_copy(
        source.at[pl.ds(step * lines + first, count)],
        target.at[pl.ds(above + first, count), pl.ds(left, window.width)],
        semaphore,
      )
    )

  if steps == 1:
    of(0, lines)
    return
  pl.when(step == 0)(lambda: of(0, lines + below))
  pl.when(step == steps - 1)(lambda: of(-above, above + lines))
  if steps > 2:
    pl.when((step > 0) & (step < steps - 1))(lambda: of(-above, above + lines + below))


def fill(
  sweep: Sweep, target: Any, side: int, blocks: tuple[Any, Any], boundary: Array, step: Any
) -> None:
  """Writes the code of zero beyond the images where copies leave it.

  Args:
    sweep: the kernel.
    target: `[2, blocks, lines, W, images, S]`, the tiles in turn, with the pixels around them.
    side: 0 in 4 bits, 1 in 8.
    blocks: the first block of K in this precision, and the one after the last.
    boundary: how many columns of x are in 4 bits.
    step: the tile's number. With 0 all pixels are written that no tile copies, and those above the
      image; with the last those below it.
  """
  window, (steps, _) = sweep.window, sweep.grid
  assert window is not None
  above, below, left, right = borders(window)
  lines, width = sweep.bordered
  sides = [*range(left), *range(width - right, width)]

  def zero(b):
    if not sweep.unsigned:
      return jnp.zeros((window.images, sweep.columns), target.dtype)
    column = jax.lax.broadcasted_iota(jnp.int32, (window.images, sweep.columns), 1)
    # Zero bits in the columns of the other precision.
    left_of = boundary - b * sweep.columns
    here = column >= left_of if side else column < left_of
    return jnp.where(here, -128 if side else -8, 0).astype(target.dtype)

  def first(b, _):
    def line(h, code):
      for slot in range(min(2, steps)):
        for v in sides:
          target[slot, b, h, v] = code
      return code

    def pixel(v, code):
      for h in range(above):
        target[0, b, h, v] = code
      return code

    code = jax.lax.fori_loop(0, lines, line, zero(b))
    jax.lax.fori_loop(0, width, pixel, code)

  def last(b, _):
    def pixel(v, code):
      for h in range(lines - below, lines):
        target[(steps - 1) % 2, b, h, v] = code
      return code

    jax.lax.fori_loop(0, width, pixel, zero(b))

  if isinstance(step, int):
    jax.lax.fori_loop(*blocks, first, None)
  pl.when(step == steps - 1)(lambda: jax.lax.fori_loop(*blocks, last, None))


def patches(sweep: Sweep, tile: Any, rows: Any) -> Array:
  """The patches of some rows of a tile, `[rows, block]` codes.

  Args:
    sweep: the kernel.
    tile: `[lines, W, images, S]` codes, with the pixels around the tile.
    rows: the slice of rows: pixels of one line, or some images of one pixel.
  """
  window = sweep.window
  assert window is not None
  above, _, left, _ = borders(window)
  pixel = div(rows.start, window.images)
  h = div(pixel, window.width)
  v = pixel - h * window.width
  count, some = -(-rows.size // window.images), min(rows.size, window.images)
  first = pl.multiple_of(rows.start - pixel * window.images, ROWS)

  def seen(offset):
    dh, dw = offset
    codes = tile[above + h + dh, pl.ds(left + v + dw, count), pl.ds(first, some)]
    return codes.reshape(rows.size, sweep.columns)

  if sweep.copies == 1:
    return jnp.concatenate([seen(offset) for offset in window.offsets], axis=1)
  # Selected as words, whatever the codes' size.
  word = lambda offset: pltpu.bitcast(seen(offset), jnp.int32)
  pieces = []
  for at in range(0, len(window.offsets), sweep.copies):
    codes = word(window.offsets[at])
    turn = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1) & (sweep.copies - 1)
    for i, offset in enumerate(window.offsets[at + 1 : at + sweep.copies], 1):
      codes = jnp.where(turn == i, word(offset), codes)
    pieces.append(pltpu.bitcast(codes, tile.dtype))
  return jnp.concatenate(pieces, axis=1)
