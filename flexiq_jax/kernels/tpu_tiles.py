"""Sizes of the TPU kernel's blocks, which tiles it writes, and the bytes that it moves."""

import dataclasses
import math

import jax
import jax.numpy as jnp

LANES = 128
ROWS = 64  # rows of an int4 register tile


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


def choose_tiles(m: int, k: int, n: int, block: int, kind: str = "TPU v5 lite") -> Tiles:
  """Tile sizes for a product of `[m, k]` and `[k, n]` with shift blocks of `block` rows.

  Args:
    m: rows of x.
    k: rows of w.
    n: outputs.
    block: rows of K in a shift block.
    kind: the device, as `jax.Device.device_kind` has it. A matrix unit of 256 x 256 (v6e, v7x)
      takes 512 rows of K a pass in int4; there the accumulator is what binds, and blocks are long.

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128.
  """
  if block % LANES or k % LANES:
    raise NotImplementedError(
      f"block, K: {block} and {k}; the TPU kernel takes multiples of {LANES} (see shift_block), "
      "the reference takes any"
    )
  long = () if "v5" in kind.lower() else (1536, 1024, 768, 512)
  fits = lambda t: k % t == 0 and (block % t == 0 or (t in (256, *long) and t % block == 0))
  block_k = next(t for t in (*long, 256, 384, 128) if fits(t))
  block_n = tile_columns(up(n, LANES))
  # As many sums as a tile of 1024 x 1024 has: filling the matrix unit pays off, code stays short.
  steps = -(-m // min(2048, 2**20 // block_n))
  return Tiles(m=up(-(-m // steps), ROWS), n=block_n, k=block_k)


def tile_columns(n: int) -> int:
  """Columns of a tile: the largest divisor of n that is a multiple of 128, up to 1,152."""
  return next(t for t in range(1152, 0, -LANES) if n % t == 0)


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

  @property
  def grid(self) -> tuple[int, int]:
    return -(-self.shape[0] // self.tiles.m), self.shape[2] // self.tiles.n

  @property
  def blocks(self) -> int:
    return self.shape[1] // self.tiles.k

  @property
  def strip(self) -> int:
    """Columns that a requantizing epilogue takes at once."""
    return math.gcd(self.tiles.n, self.granule) if self.granule else self.tiles.n

  @property
  def vmem(self) -> int:
    """Bytes of on-chip memory: weights, two tiles of activations, sums, results, vectors."""
    (_, k, n), t = self.shape, self.tiles
    held = (k * n + 2 * t.m * k) * 3 // 2 + 4 * t.m * t.n
    results = t.m * t.n * (jnp.dtype(self.out).itemsize if self.signed is None else 2)
    rows = sum(up(size, 8) for _, size in self.vectors)
    return held + 2 * (results + 4 * t.n * rows + self.dynamic * 4 * t.m * LANES)

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
    boundary: rows of K in 4 bits.
    next_boundary: outputs in 4 bits in the next layer, where the epilogue requantizes.
  """
  (m, k, n), tiles = plan.shape, plan.tiles
  low = -(-boundary // tiles.k) * tiles.k
  high = k - boundary // tiles.k * tiles.k
  rows, columns = plan.grid
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
    x=m * low // 2 + m * high + plan.dynamic * 4 * m * (k // plan.block),
    w=n * low // 2 + n * high,
    y=y,
    # One tile of columns stays from one row of tiles to the next; several come again.
    vectors=vectors * (1 if columns == 1 else rows),
  )


def check_tiles(tiles: Tiles, k: int, block: int) -> None:
  if k % tiles.k or (block % tiles.k and tiles.k % block) or block % LANES:
    raise NotImplementedError(
      f"tiles.k: {tiles.k} with K = {k} and shift blocks of {block}; a divisor of K is accepted "
      f"that is a multiple or a divisor of the shift block, all multiples of {LANES}"
    )


def div(a, b: int):
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
