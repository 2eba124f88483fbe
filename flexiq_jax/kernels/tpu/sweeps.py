"""Static facts of one TPU kernel: which tiles it writes, and the bytes that it moves."""

import dataclasses
import math

import jax.numpy as jnp

from flexiq_jax.kernels.tpu.tiling import LANES, ROWS, Tiles, div, least, margin, most, up
from flexiq_jax.kernels.windows import Window, neighbours

_CODE = 8192  # bundles of one turn through a tile, about


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
  def margin(self) -> int:
    """Rows of x that are kept before and after a tile."""
    return 0 if self.window is None else margin(self.window)

  @property
  def halo(self) -> bool:
    """Whether windows see pixels of other tiles."""
    return self.window is not None and self.grid[0] > 1 and self.period > 1

  @property
  def period(self) -> int:
    """Tiles until the pixels of an image come again at the same place."""
    if self.window is None or self.tiles.m % self.window.pixels == 0 or self.grid[0] == 1:
      return 1
    return self.window.pixels // self.tiles.m

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
    passes = self.tiles.k // LANES * (self.tiles.n // LANES)  # of 8 rows through the matrix unit
    sizes = range(ROWS, self.tiles.m + 1, ROWS)
    fit = [t for t in sizes if self.tiles.m % t == 0 and t // 8 * passes <= _CODE]
    return max(fit, default=ROWS)

  @property
  def fused(self) -> bool:
    """Whether the epilogue runs beside the last block's products.

    One that requantizes does on wide units, where its strips are no narrower than the unit.
    """
    narrow = self.strip < min(256, self.tiles.n)
    return self.signed is None or (self.wide and self.window is None and not narrow)

  @property
  def spilled(self) -> int:
    """Bytes of on-chip memory for what the compiler's registers do not hold, at most."""
    return 2**24 if self.wide else 2**23

  def product_rows(self, side: int) -> int:
    """Rows that one product takes in the program, in 4 bits (side 0) or in 8.

    A wide matrix unit takes codes of 4 bits in an order of its own. The compiler brings the weights
    into it for each product, so there they are few.
    """
    return 1024 if self.wide and self.window is None and side == 0 else 256

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
    else:
      rows = t.m + 2 * self.margin
      held += 2 * rows * k // self.steps * 3 // 2 + rows * self.columns
      held += self.mask_bytes * 2
    results = t.m * t.n * (jnp.dtype(self.out).itemsize if self.signed is None else 2)
    rows = sum(up(size, 8) for _, size in self.vectors)
    return held + 2 * (results + 4 * t.n * rows + self.dynamic * 4 * t.m * LANES)

  @property
  def mask_bytes(self) -> int:
    """Of what says in a tile which pixels have their neighbours."""
    if self.window is None:
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
  seen = m + (rows - 1) * 2 * sweep.margin if sweep.halo else m
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
