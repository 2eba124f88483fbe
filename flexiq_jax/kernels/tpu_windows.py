"""Patches of a convolution, made on the chip: im2col that never touches main memory.

A tile of rows of x comes once; each window position of it is the same rows, some further. Rows lie
packed in words of 32 bits, four or eight of them, so a position is two words shifted into one:

    out[q] = words[q + a] >> 8 b  |  words[q + a + 1] << (32 - 8 b),   4 a + b rows further

Beyond the border of an image the code of zero takes its place, by masks of the pixels whose
neighbour (up, down, left, right) is missing. A register of patches takes about 1.4 bundles on a
v5e, where multiplying it with 128 outputs takes 4 (8 in 4 bits: half as many for each code).

Tiles are whole images, or whole parts of one image with a margin of the rows around them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels.tpu_tiles import LANES, ROWS, Plan, div
from flexiq_jax.kernels.windows import neighbours

Array = Any
_ZEROS = {8: -0x7F7F7F80, 4: -0x77777778}  # words of -128 and of -8, what unsigned zeros became


def masks(plan: Plan) -> tuple[Array, Array]:
  """Which pixels have their neighbours, as words of 8-bit and of 4-bit codes.

  Returns:
    int32 `[D, rows / 4, LANES]` and `[D, rows / 8, LANES]` for the D steps up, down, left or right
    that positions of the window make, all bits of a row that has the neighbour set.
  """
  window = plan.window
  assert window is not None
  _, inside = neighbours(window, plan.tiles.m * plan.period)
  made = []
  for bits in (8, 4):
    per = 32 // bits
    place = bits * np.arange(per, dtype=np.uint32)
    ones = np.uint32(2**bits - 1) << place
    words = np.where(inside.reshape(len(inside), -1, per), ones, np.uint32(0)).sum(axis=2)
    words = jnp.asarray(words.astype(np.uint32).view(np.int32))[:, :, None]
    made.append(jnp.broadcast_to(words, (*words.shape[:2], LANES)))
  return made[0], made[1]


def mask_specs(plan: Plan) -> list[pl.BlockSpec]:
  """How a step of the grid takes its masks."""
  window = plan.window
  assert window is not None
  count = len(neighbours(window, 1)[0])
  index = lambda i, *_: (0, jax.lax.rem(i, plan.period), 0)
  return [pl.BlockSpec((count, plan.tiles.m // per, LANES), index) for per in (4, 8)]


def words_shape(plan: Plan) -> tuple[int, int]:
  """Of the scratch memory that holds LANES columns of a tile and its margins as words."""
  return (plan.tiles.m + 2 * plan.margin) // 4, LANES


def turn_rows(m: int) -> int:
  """Rows that one turn of the loops makes, of a tile of m."""
  return max(t for t in range(ROWS, min(512, m) + 1, ROWS) if m % t == 0)


def build(plan: Plan, low: bool, block: Any, boundary: Array, refs: tuple[Any, ...]) -> None:
  """Makes the patches of one shift block.

  Args:
    plan: the kernel.
    low: whether codes are 4-bit.
    block: the shift block's number.
    boundary: how many columns of x are in 4 bits.
    refs: the tile with its margins, `[margin + m + margin, S]` codes; the patches,
      `[m, taps * S]`; scratch memory of `words_shape`; and masks of `masks`, for this width.
  """
  tile, out, words, mask = refs
  window, m = plan.window, plan.tiles.m
  assert window is not None
  bits = 4 if low else 8
  per = 32 // bits
  steps, _ = neighbours(window, 1)
  turn = turn_rows(m)
  size, margin, depth = turn // per, plan.margin // per, plan.columns
  start = block * depth

  def stage(row, rows, lanes):
    aligned = lambda row, granule: pl.multiple_of(row, granule)
    codes = tile[pl.ds(aligned(row, ROWS), rows), lanes]
    words[pl.ds(aligned(div(row, per), ROWS // per), rows // per)] = pltpu.bitcast(codes, jnp.int32)

  def moved(first, rows):
    """Words of the same rows, some further."""
    ahead, rest = divmod(rows, per)
    here = words[pl.ds(first + ahead, size)]
    if not rest:
      return here
    behind = words[pl.ds(first + ahead + 1, size)]
    here = jax.lax.shift_right_logical(here, jnp.int32(bits * rest))
    return here | (behind << (32 - bits * rest))

  def columns(c, _):
    lanes = pl.ds(pl.multiple_of(c * LANES, LANES), LANES)
    if plan.halo:
      stage(0, plan.margin, lanes)
      stage(plan.margin + m, plan.margin, lanes)
    jax.lax.fori_loop(0, m // turn, lambda i, _: stage(plan.margin + i * turn, turn, lanes), None)
    place = start + c * LANES + jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
    here = place < boundary if low else place >= boundary
    border = jnp.where(here, jnp.int32(_ZEROS[bits]), 0)

    def rows(i, _):
      first = margin + i * size
      for position, (offset, distance) in enumerate(zip(window.offsets, window.rows, strict=True)):
        codes = moved(first, distance)
        known = [
          mask[steps.index((a, d)), pl.ds(pl.multiple_of(i * size, ROWS // per), size)]
          for a, d in enumerate(offset)
          if d
        ]
        if known:
          inside = functools.reduce(jnp.bitwise_and, known)
          codes = ((codes ^ border) & inside) ^ border if plan.unsigned else codes & inside
        to = pl.ds(pl.multiple_of(position * depth + c * LANES, LANES), LANES)
        at = pl.ds(pl.multiple_of(i * turn, ROWS), turn)
        out[at, to] = pltpu.bitcast(codes, out.dtype)

    jax.lax.fori_loop(0, m // turn, rows, None)

  jax.lax.fori_loop(0, depth // LANES, columns, None)
