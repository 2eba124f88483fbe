"""Tiles of the Hopper kernel: what fits a streaming multiprocessor, and which to take."""

import dataclasses

TILE_K = 128  # rows of K in a step
ROW = 128  # bytes of a row in the buffer that stages results
STRIP = 64  # granule of outputs
SHARED = 227 * 1024 - 1024  # bytes of shared memory for buffers; barriers take a little
CORES = 132  # streaming multiprocessors of an H100 (SXM) or H200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Sizes of the kernel's blocks.

  Attributes:
    m: rows of a tile, a multiple of 64.
    n: outputs of a tile; each warpgroup's share is a multiple of 64 up to 256.
    groups: warpgroups that multiply, 1 or 2.
    buffers: K tiles in flight, at least 2.
  """

  m: int
  n: int
  groups: int = 2
  buffers: int = 2

  def __post_init__(self):
    if self.groups not in (1, 2):
      raise ValueError(f"tiles.groups: {self.groups}; 1 or 2 is accepted")
    if self.m < 64 or self.m % 64:
      raise ValueError(f"tiles.m: {self.m}; a positive multiple of 64 is accepted")
    strip, rest = divmod(self.n, self.groups)
    if rest or strip % STRIP or not STRIP <= strip <= 256:
      raise ValueError(
        f"tiles.n: {self.n} for {self.groups} warpgroups; a multiple of 64 up to 256 for each is "
        "accepted"
      )
    if self.m * strip > 128 * 128:
      raise ValueError(
        f"tiles.m, tiles.n: {self.m} x {strip} sums a warpgroup; its registers hold 128 x 128"
      )
    if self.buffers < 2:
      raise ValueError(f"tiles.buffers: {self.buffers}; at least 2 are accepted")

  @property
  def shared_bytes(self) -> int:
    """Shared memory of the kernel, barriers aside."""
    ring = self.buffers * ((self.m + self.n) * TILE_K + 2 * self.n)
    return ring + self.groups * self.m * ROW


def choose_tiles(m: int, n: int) -> Tiles:
  """Tile sizes for M rows and N' outputs: the largest tiles that keep every core busy."""
  sizes = [(128, 256, 2), (128, 128, 2), (64, 128, 2), (128, 64, 1), (64, 64, 1)]
  fits = [s for s in sizes if n % s[1] == 0 and s[0] <= -(-m // 64) * 64]
  count = lambda s: -(-m // s[0]) * (n // s[1])
  rows, columns, groups = next((s for s in fits if count(s) >= CORES), max(fits, key=count))
  tiles = Tiles(m=rows, n=columns, groups=groups)
  for buffers in (6, 5, 4, 3):
    deeper = dataclasses.replace(tiles, buffers=buffers)
    if deeper.shared_bytes <= SHARED:
      return deeper
  return tiles


def check_tiles(tiles: Tiles, n: int) -> None:
  """Checks tiles against N' outputs.

  Raises:
    ValueError: tiles that do not divide the outputs or do not fit into shared memory.
  """
  if n % tiles.n:
    raise ValueError(f"tiles.n: {tiles.n} does not divide the {n} padded outputs")
  if (size := tiles.shared_bytes) > SHARED:
    raise ValueError(
      f"tiles: {tiles} needs {size} bytes of shared memory; {SHARED} are there "
      "(fewer buffers, smaller m or n)"
    )
