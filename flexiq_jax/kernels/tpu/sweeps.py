"""Static facts of one TPU kernel: which tiles it writes, and the bytes that it moves."""

import dataclasses
import math

import jax.numpy as jnp

from flexiq_jax.kernels.tpu.epilogues import epilogue_rows
from flexiq_jax.kernels.tpu.tiling import (
  LANES,
  ROWS,
  Tiles,
  borders,
  div,
  least,
  margin,
  most,
  spilled,
  up,
)
from flexiq_jax.kernels.windows import Window, neighbours

_CODE = 8192  # bundles of one turn through a tile, about
_TURN = 7168  # its rows where images are innermost, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """How one kernel goes through a product: its static facts.

  Attributes:
    shape: M, K, N, padded to whole register tiles.
    tiles: block sizes.
    block: rows of K in a shift block.
    activation, out: of the epilogue.
    signed: whether the next layer's codes are signed; None where the epilogue does not requantize.
    granule: see `operands.Requantize`.
    dynamic: whether activation shifts are chosen at run time.
    vectors: operands with a column for each output, and their rows.
    interpret: whether it runs in interpret mode.
    window: of a convolution; None where x has all rows of K.
    copies: see `operands.Weights`; read with a window, as the next.
    unsigned: whether zero activations have the codes -128 and -8.
    wide: see `tiling.wide`.
  """

  shape: tuple[int, int, int]
  tiles: Tiles
  block: int
  activation: str
  out: str
  signed: bool | None
  granule: int
  dynamic: bool
  vectors: tuple[tuple[str, int], ...]
  interpret: bool
  window: Window | None = None
  copies: int = 1
  unsigned: bool = False
  wide: bool = False

  @property
  def steps(self) -> int:
    """How many rows of w each column of x has."""
    return 1 if self.window is None else self.window.steps(self.copies)

  @property
  def columns(self) -> int:
    """Columns of x of a block of K."""
    return self.tiles.k // self.steps

  @property
  def innermost(self) -> bool:
    """Whether rows are pixels of all images, one after the other: `pixels` makes the patches."""
    return self.window is not None and self.window.images > 1

  @property
  def line(self) -> int:
    """Rows of one line of pixels of all images."""
    return 0 if self.window is None else self.window.width * self.window.images

  @property
  def margin(self) -> int:
    """Rows of x that are kept before and after a tile of rows image by image."""
    return 0 if self.window is None or self.innermost else margin(self.window)

  @property
  def halo(self) -> bool:
    """Whether windows see pixels of other tiles."""
    return self.window is not None and self.grid[0] > 1 and (self.innermost or self.period > 1)

  @property
  def period(self) -> int:
    """Tiles until the pixels of an image come again at the same place."""
    if self.window is None or self.tiles.m % self.window.pixels == 0 or self.grid[0] == 1:
      return 1
    return 1 if self.innermost else self.window.pixels // self.tiles.m

  @property
  def grid(self) -> tuple[int, int]:
    return -(-self.shape[0] // self.tiles.m), self.shape[2] // self.tiles.n

  @property
  def blocks(self) -> int:
    return self.shape[1] // self.tiles.k

  @property
  def turn(self) -> int:
    """Rows whose products the program lays out at once: tiles of whole images may be long."""
    if self.window is None:
      return self.tiles.m
    return self._turn(self.tiles.n)

  def _turn(self, columns: int) -> int:
    """The same of products with so many columns."""
    passes = self.tiles.k // LANES * (columns // LANES)  # of 8 rows through the matrix unit
    if self.window is None or not self.innermost:
      sizes = [t for t in range(ROWS, self.tiles.m + 1, ROWS) if self.tiles.m % t == 0]
    else:  # whole lines, or whole pixels that divide one
      width, images, lines = self.window.width, self.window.images, self.tiles.m // self.line
      sizes = [images * p for p in range(1, width) if width % p == 0]
      sizes += [self.line * h for h in range(1, lines + 1) if lines % h == 0]
      sizes = [t for t in sizes if t <= _TURN]
    # A wide unit takes a pass in a third of the bundles.
    code = 2 * _CODE if self.innermost and self.wide else _CODE
    return max([t for t in sizes if t // 8 * passes <= code], default=min(sizes, default=ROWS))

  def parts(self, side: int, turn: int) -> tuple[tuple[int, int], ...]:
    """(first, number) of the rows of a turn that one product takes; see `product_rows`."""
    size, span = self.product_rows(side), turn
    if self.window is not None and self.innermost:
      # A product takes pixels of one line, or images of one pixel.
      images = self.window.images
      span = min(turn, self.line if images <= size else images)
      size = size // images * images or size
    return tuple(
      (start + at, min(size, span - at))
      for start in range(0, turn, span)
      for at in range(0, span, size)
    )

  @property
  def fused(self) -> bool:
    """Whether the epilogue runs beside the last block's products.

    One that requantizes does where images are innermost, and on wide units, where its strips are
    no narrower than the unit.
    """
    narrow = self.strip < min(256, self.tiles.n)
    beside = self.innermost or (self.wide and self.window is None and not narrow)
    return self.signed is None or beside

  @property
  def finishing(self) -> int:
    """Rows of one turn of an epilogue that requantizes."""
    if self.innermost:
      return self._turn(self.strip)
    return epilogue_rows(self.tiles.m, self.strip, self.fused)

  @property
  def spilled(self) -> int:
    """See `tiling.spilled`."""
    return spilled(self.wide)

  def product_rows(self, side: int) -> int:
    """Rows that one product takes in the program, in 4 bits (side 0) or in 8.

    A wide matrix unit takes codes of 4 bits in an order of its own. The compiler brings the weights
    into it for each product, so there they are few.
    """
    if side == 1 or (self.window is not None and not self.innermost):
      return 256
    return 1024 if self.wide else 512 if self.innermost else 256

  @property
  def strip(self) -> int:
    """Columns that a requantizing epilogue takes at once."""
    return math.gcd(self.tiles.n, self.granule) if self.granule else self.tiles.n

  @property
  def vmem(self) -> int:
    """Bytes of on-chip memory: weights, two tiles of activations, sums, results, vectors."""
    (_, k, n), t = self.shape, self.tiles
    held = k * n * 3 // 2 + 4 * t.m * t.n
    if self.window is None:
      held += 2 * t.m * k * 3 // 2
    elif self.innermost:
      held += 2 * math.prod(self.bordered) * self.window.images * k // self.steps * 3 // 2
    else:
      rows = t.m + 2 * self.margin
      held += 2 * rows * k // self.steps * 3 // 2 + rows * self.columns
      held += self.mask_bytes * 2
    results = t.m * t.n * (jnp.dtype(self.out).itemsize if self.signed is None else 2)
    rows = sum(up(size, 8) for _, size in self.vectors)
    return held + 2 * (results + 4 * t.n * rows + self.dynamic * 4 * t.m * LANES)

  @property
  def bordered(self) -> tuple[int, int]:
    """Lines of a tile of pixels of all images and pixels of a line, with those around them."""
    assert self.window is not None
    above, below, left, right = borders(self.window)
    return self.tiles.m // self.line + above + below, self.window.width + left + right

  @property
  def mask_bytes(self) -> int:
    """Of what says in a tile which pixels have their neighbours."""
    if self.window is None or self.innermost:
      return 0
    return len(neighbours(self.window, 1)[0]) * (self.tiles.m // 4 + self.tiles.m // 8) * 4 * LANES

  def written(self, boundary):
    """End of the outputs written in 4 bits, and start of those written in 8."""
    if not self.granule:
      return self.shape[2], 0
    g = self.granule
    return div(boundary + g - 1, g) * g, div(boundary, g) * g

  def low_column(self, j, boundary):
    """The tile of columns whose 4-bit codes leave after step j: never one that is not written."""
    end, _ = self.written(boundary)
    return least(j, most(div(end + self.tiles.n - 1, self.tiles.n) - 1, 0))

  def high_column(self, j, boundary):
    """The same of the 8-bit codes."""
    _, start = self.written(boundary)
    return most(j, least(div(start, self.tiles.n), self.grid[1] - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """Bytes between main memory and the core for one product.

  Attributes:
    x, w, y: activations, weights, results.
    vectors: shifts, scales and what else has a column for each output.
  """

  x: int
  w: int
  y: int
  vectors: int

  @property
  def total(self) -> int:
    return self.x + self.w + self.y + self.vectors


def traffic(sweep: Sweep, boundary: int, next_boundary: int = 0) -> Traffic:
  """What a kernel moves at a boundary: its copies and tiles, counted as it makes them.

  Args:
    sweep: the kernel.
    boundary: columns of x in 4 bits.
    next_boundary: outputs in 4 bits in the next layer, where the epilogue requantizes.
  """
  (m, k, n), tiles = sweep.shape, sweep.tiles
  low = -(-boundary // sweep.columns) * tiles.k
  high = k - boundary // sweep.columns * tiles.k
  rows, columns = sweep.grid
  seen = m
  if sweep.halo and sweep.window is not None:
    around = 2 * sweep.margin
    if sweep.innermost:
      around = sum(borders(sweep.window)[:2]) * sweep.line
    seen += (rows - 1) * around
  if sweep.signed is None:
    y = m * n * jnp.dtype(sweep.out).itemsize
  else:
    # A tile leaves when the next one takes its place: each number in a row of tiles once.
    count = lambda index: len({index(j) for j in range(columns)})
    tile = m * tiles.n
    y = tile * count(lambda j: sweep.high_column(j, next_boundary))
    y += tile // 2 * count(lambda j: sweep.low_column(j, next_boundary))
  vectors = sum(size for _, size in sweep.vectors) * n * 4
  return Traffic(
    x=seen * (low // 2 + high) // sweep.steps + sweep.dynamic * 4 * m * (k // sweep.block),
    w=n * low // 2 + n * high,
    y=y,
    # One tile of columns stays from one row of tiles to the next; several come again.
    vectors=vectors * (1 if columns == 1 else rows)
    + sweep.mask_bytes * (1 if sweep.period == 1 else rows),
  )
