"""Sizes of the TPU kernel's blocks, which tiles it writes, and the bytes that it moves."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax.kernels.windows import Window, neighbours

LANES = 128
ROWS = 64  # rows of an int4 register tile
_IMAGES = 5184  # rows of a tile of whole images, at most
_CODE = 8192  # bundles of one turn through a tile, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Sizes of the kernel's blocks.

  Attributes:
    m: rows of a tile, a multiple of 64.
    n: outputs of a tile, a multiple of 128.
    k: rows of K in a block, a multiple of 128, and a multiple or a divisor of the shift block.
  """

  m: int
  n: int
  k: int

  def __post_init__(self):
    for field, granule in (("m", ROWS), ("n", LANES), ("k", LANES)):
      value = getattr(self, field)
      if value < granule or value % granule:
        raise ValueError(f"tiles.{field}: {value}; a positive multiple of {granule} is accepted")


def choose_tiles(
  m: int,
  k: int,
  n: int,
  block: int,
  kind: str = "TPU v5 lite",
  window: Window | None = None,
  granule: int = 0,
) -> Tiles:
  """Tile sizes for a product of `[m, k]` and `[k, n]` with shift blocks of `block` rows.

  Args:
    m: rows of x.
    k: rows of w.
    n: outputs.
    block: rows of K in a shift block.
    kind: the device, as `jax.Device.device_kind` has it. A matrix unit of 256 x 256 (v6e, v7x)
      takes 512 rows of K a pass in int4; there the accumulator is what binds, and blocks are long.
    window: of a convolution; None where x has all rows of K.
    granule: of an epilogue that requantizes (see `operands.Requantize`).

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128, or images of a size that
      no tile fits.
  """
  if block % LANES or k % LANES:
    raise NotImplementedError(
      f"block, K: {block} and {k}; the TPU kernel takes multiples of {LANES} (see shift_block), "
      "the reference takes any"
    )
  if window is not None:
    return Tiles(m=window_rows(window, m), n=tile_columns(up(n, LANES)), k=block)
  long = (1536, 1024, 768, 512) if wide(kind) else ()
  fits = lambda t: k % t == 0 and (block % t == 0 or (t in (256, *long) and t % block == 0))
  block_k = next(t for t in (*long, 256, 384, 128) if fits(t))
  if wide(kind):
    block_n = wide_columns(up(n, LANES), granule)
    return Tiles(m=wide_rows(m, k), n=block_n, k=block_k)
  block_n = tile_columns(up(n, LANES))
  # As many sums as a tile of 1024 x 1024 has: filling the matrix unit pays off, code stays short.
  steps = -(-m // min(2048, 2**20 // block_n))
  return Tiles(m=up(-(-m // steps), ROWS), n=block_n, k=block_k)


def wide(kind: str) -> bool:
  """Whether a generation's matrix unit is 256 x 256 and erf is in hardware: v6e and v7x."""
  return "v5" not in kind.lower()


def window_rows(window: Window, m: int | None = None) -> int:
  """Rows of a tile of a convolution: all, whole images, or a part that an image has a number of.

  Args:
    window: the window.
    m: rows of x; None: so many that they are not all in one tile.

  Raises:
    NotImplementedError: images of a size that no tile fits.
  """
  if m is not None and m <= _IMAGES:
    return up(m, ROWS)
  whole = math.lcm(window.pixels, ROWS)
  if whole <= _IMAGES:
    return whole * max(1, 2048 // whole)
  parts = [t for t in range(ROWS, 2049, ROWS) if window.pixels % t == 0 and t >= margin(window)]
  if not parts:
    raise NotImplementedError(
      f"window: images of {window.height} x {window.width} pixels; the TPU kernel takes those that "
      f"have parts of a multiple of {ROWS} pixels, or of which few have so many together"
    )
  return parts[-1]


def margin(window: Window) -> int:
  """Rows before and behind a tile that its windows may reach, whole register tiles of them."""
  return up(window.reach + 8, ROWS)


def tile_columns(n: int) -> int:
  """Columns of a tile: the largest divisor of n that is a multiple of 128, up to 1,152."""
  return next(t for t in range(1152, 0, -LANES) if n % t == 0)


def wide_columns(n: int, granule: int = 0) -> int:
  """The same for a matrix unit of 256 columns, which should not be half empty.

  Args:
    n: columns, a multiple of 128.
    granule: what an epilogue that requantizes takes at once should be large.
  """
  whole = [t for t in range(LANES, min(n, 1152) + 1, LANES) if n % t == 0]
  return max(whole, key=lambda t: (t % 256 == 0, math.gcd(t, granule), t))


def wide_rows(m: int, k: int) -> int:
  """Rows of a tile there: few rows beyond m, few tiles, and few parts of a tile (`turn_rows`).

  By the schedules a tile costs as much as 200 rows more, and a part as much as 50. Two tiles of x
  in both precisions take 3 k bytes a row, 32 MiB of them at most.
  """
  if m <= 256:
    return up(m, ROWS)
  sizes = range(256, max(257, min(2048, 2**25 // (3 * k)) + 1), ROWS)
  parts = {t: max(p for p in range(ROWS, 513, ROWS) if t % p == 0) for t in sizes}
  return min(parts, key=lambda t: -(-m // t) * (t + 200 + 50 * t // parts[t]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Static facts of one kernel.

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
    wide: see `wide`.
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
    """Rows of x that are kept before and behind a tile."""
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


def traffic(plan: Plan, boundary: int, next_boundary: int = 0) -> Traffic:
  """What a kernel moves at a boundary: its copies and tiles, counted as it makes them.

  Args:
    plan: the kernel.
    boundary: columns of x in 4 bits.
    next_boundary: outputs in 4 bits in the next layer, where the epilogue requantizes.
  """
  (m, k, n), tiles = plan.shape, plan.tiles
  low = -(-boundary // plan.columns) * tiles.k
  high = k - boundary // plan.columns * tiles.k
  rows, columns = plan.grid
  seen = m + (rows - 1) * 2 * plan.margin if plan.halo else m
  if plan.signed is None:
    y = m * n * jnp.dtype(plan.out).itemsize
  else:
    # A tile leaves when the next one takes its place: each number in a row of tiles once.
    count = lambda index: len({index(j) for j in range(columns)})
    tile = m * tiles.n
    y = tile * count(lambda j: plan.high_column(j, next_boundary))
    y += tile // 2 * count(lambda j: plan.low_column(j, next_boundary))
  vectors = sum(size for _, size in plan.vectors) * n * 4
  return Traffic(
    x=seen * (low // 2 + high) // plan.steps + plan.dynamic * 4 * m * (k // plan.block),
    w=n * low // 2 + n * high,
    y=y,
    # One tile of columns stays from one row of tiles to the next; several come again.
    vectors=vectors * (1 if columns == 1 else rows)
    + plan.mask_bytes * (1 if plan.period == 1 else rows),
  )


def check_window(tiles: Tiles, m: int, block: int, window: Window, copies: int) -> None:
  """Checks what the kernel takes of a convolution.

  Args:
    tiles: block sizes.
    m: rows of x.
    block: rows of K in a shift block.
    window: the window.
    copies: see `operands.Weights`.
  """
  columns = block // window.steps(copies)
  if columns % LANES:
    raise NotImplementedError(
      f"block: {columns} columns of x; the TPU kernel takes multiples of {LANES}"
    )
  if LANES % copies:
    raise NotImplementedError(f"copies: {copies}; the TPU kernel takes divisors of {LANES}")
  if tiles.k != block:
    raise NotImplementedError(
      f"tiles.k: {tiles.k} with windows and shift blocks of {block}; whole blocks are accepted"
    )
  pixels = window.pixels
  part = pixels % tiles.m == 0 and tiles.m >= margin(window)
  if tiles.m < m and tiles.m % pixels and not part:
    raise NotImplementedError(
      f"tiles.m: {tiles.m} with images of {pixels} pixels; all rows, whole images, or parts of at "
      f"least {margin(window)} rows that divide one are accepted"
    )


def check_tiles(tiles: Tiles, k: int, block: int) -> None:
  if k % tiles.k or (block % tiles.k and tiles.k % block) or block % LANES:
    raise NotImplementedError(
      f"tiles.k: {tiles.k} with K = {k} and shift blocks of {block}; a divisor of K is accepted "
      f"that is a multiple or a divisor of the shift block, all multiples of {LANES}"
    )


def div(a, b: int) -> Any:
  """Quotient of numbers that are not negative; a traced `//` would ask for the sign, at a cost."""
  return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def least(a, b):
  """The smaller of two plain or traced numbers."""
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def most(a, b):
  """The larger of two plain or traced numbers."""
  return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def up(value: int, granule: int) -> int:
  return -(-value // granule) * granule
