"""Sizes of the TPU kernel's blocks, by rule."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax.kernels.windows import Window

LANES = 128
ROWS = 64  # rows of an int4 register tile
_IMAGES = 5184  # rows of a tile of whole images, at most
_PIXELS = 2**16  # rows of a tile of pixels whose images are innermost, at most
# Bytes on the chip, of which v5e and v6e have twice as many as others, and of these what codes and
# sums of a tile of pixels take at most.
_MEMORY = {True: 128 * 2**20, False: 63 * 2**20}
_HELD = {True: 88 * 2**20, False: 40 * 2**20}


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
  copies: int = 1,
) -> Tiles:
  """Tile sizes for a product of `[m, k]` and `[k, n]` with shift blocks of `block` rows.

  Args:
    m: rows of x.
    k: rows of w.
    n: outputs.
    block: rows of K in a shift block.
    kind: the device, as `jax.Device.device_kind` has it. A matrix unit of 256 x 256 (v6e, v7x)
      takes 512 rows of K per pass in int4; there the accumulator is the limit, and blocks are long.
    window: of a convolution; None where x has all rows of K.
    granule: of an epilogue that requantizes (see `operands.Requantize`).
    copies: see `operands.Weights`; read with a window.

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128, images of a size that no
      tile fits, or weights that do not fit on the chip.
  """
  if block % LANES or k % LANES:
    raise NotImplementedError(
      f"block, K: {block} and {k}; the TPU kernel takes multiples of {LANES} (see shift_block), "
      "the reference takes any"
    )
  if window is not None:
    columns = tile_columns(up(n, LANES))
    if window.images > 1:
      rows = pixel_rows(window, k // window.steps(copies), columns, kind)
      return Tiles(m=rows, n=columns, k=block)
    return Tiles(m=window_rows(window, m), n=columns, k=block)
  long = ()
  if wide(kind):
    # A boundary inside a block costs both precisions there: a block spans several shift blocks only
    # where one is too short for the matrix unit.
    long = (1536, 1024, 768, 512) if block >= 512 else (768, 512, 1024, 1536)
  spans = (256, *long) if block < 512 else ()
  fits = lambda t: k % t == 0 and (block % t == 0 or (t in spans and t % block == 0))
  block_k = next(t for t in (*long, 256, 384, 128) if fits(t))
  columns = up(n, LANES)
  block_n = wide_columns(columns, granule) if wide(kind) else tile_columns(columns)
  held = rows_held(k, columns, block_n, kind)
  if not held:
    raise NotImplementedError(
      f"w: K = {k} and N = {n} do not fit into the {memory(kind) >> 20} MiB on the chip of a "
      f"{kind}; split the outputs, or use the reference"
    )
  if wide(kind):
    return Tiles(m=min(wide_rows(m, k), held), n=block_n, k=block_k)
  # As many sums as a tile of 1024 x 1024 has: filling the matrix unit pays off, code stays short.
  steps = -(-m // min(2048, 2**20 // block_n, held))
  return Tiles(m=up(-(-m // steps), ROWS), n=block_n, k=block_k)


def wide(kind: str) -> bool:
  """Whether a generation's matrix unit is 256 x 256 and erf is in hardware: v6e and v7x."""
  return "v5" not in kind.lower()


def memory(kind: str) -> int:
  """Bytes on the chip of a generation."""
  return _MEMORY["lite" in kind]


def spilled(wide: bool) -> int:
  """Bytes of these for what the compiler's registers do not hold, at most."""
  return 2**24 if wide else 2**23


def rows_held(k: int, n: int, columns: int, kind: str) -> int:
  """Rows of a tile that fit on the chip beside the layer's weights, a multiple of 64.

  Args:
    k: rows of w.
    n: outputs, a multiple of 128.
    columns: outputs of a tile.
    kind: the device, as for `choose_tiles`.
  """
  room = memory(kind) - spilled(wide(kind)) - k * n * 3 // 2 - 2**20  # and vectors
  # x in both precisions, results of float32 and row shifts twice, sums once.
  return max(0, room // (3 * k + 12 * columns + 8 * LANES)) // ROWS * ROWS


def fits(k: int, n: int, kind: str) -> bool:
  """Whether a layer's weights leave room for a tile."""
  return rows_held(k, up(n, LANES), LANES, kind) > 0


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


def pixel_rows(window: Window, columns: int, n: int, kind: str = "") -> int:
  """Rows of a tile where images are innermost: lines of pixels of all images.

  Args:
    window: the window.
    columns: of x.
    n: outputs of a tile.
    kind: the device, as for `choose_tiles`; empty: tiles that every one takes.

  Raises:
    NotImplementedError: images whose number is no multiple of 64, or that are too many.
  """
  line, (above, below, left, right) = window.width * window.images, borders(window)
  least = max(1, above, below)  # further than the next tile no window reaches
  held = _HELD["lite" in kind]

  def fits(h: int) -> bool:
    x = 3 * (h + above + below) * (line + (left + right) * window.images) * columns
    return window.height % h == 0 and h * line <= _PIXELS and x + 8 * h * line * n <= held

  found = [h for h in range(least, window.height + 1) if fits(h)]
  if window.images % ROWS or not found:
    raise NotImplementedError(
      f"window: {window.images} images of {window.height} x {window.width} pixels side by side; "
      f"the TPU kernel takes multiples of {ROWS}, as many as fit on the chip with {least} lines"
    )
  # One tile alone is not read beside another's work.
  several = [h for h in found if h < window.height and h * line >= _PIXELS // 8]
  return max(several or found) * line


def of_batch(window: Window, images: int, columns: int, n: int) -> Window:
  """The window of a batch: with images innermost where the kernel takes so many.

  Args:
    window: the window, image by image.
    images: of the batch.
    columns: of x.
    n: outputs.
  """
  innermost = dataclasses.replace(window, images=images)
  try:
    pixel_rows(innermost, columns, tile_columns(up(n, LANES)))
  except NotImplementedError:
    return window
  return innermost


def borders(window: Window) -> tuple[int, int, int, int]:
  """How many pixels the window reaches beyond an image: above, below, left, right."""
  steps = [[offset[axis] for offset in window.offsets] for axis in (0, 1)]
  (above, below), (left, right) = [(max(0, -min(s)), max(0, max(s))) for s in steps]
  return above, below, left, right


def margin(window: Window) -> int:
  """Rows before and after a tile that its windows may reach, in whole register tiles."""
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
  """Rows of a tile there: few rows beyond m, few tiles, and few parts of a tile (`epilogue_rows`).

  By the compiler's schedules a tile costs as much as 200 more rows, and a part as much as 50. Two
  tiles of x in both precisions take 3 k bytes per row, and 32 MiB at most.
  """
  if m <= 256:
    return up(m, ROWS)
  sizes = range(256, max(257, min(2048, 2**25 // (3 * k)) + 1), ROWS)
  parts = {t: max(p for p in range(ROWS, 513, ROWS) if t % p == 0) for t in sizes}
  return min(parts, key=lambda t: -(-m // t) * (t + 200 + 50 * t // parts[t]))


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
  if window.images > 1:
    line = window.width * window.images
    least = max(1, *borders(window)[:2]) * line
    if window.images % ROWS or m != window.height * line or tiles.m % line or m % tiles.m:
      raise NotImplementedError(
        f"tiles.m: {tiles.m} with {m} rows, {window.images} images side by side; for all images, a "
        f"multiple of {ROWS}, parts of whole lines of {line} rows are accepted"
      )
    if least > tiles.m:
      raise NotImplementedError(
        f"tiles.m: {tiles.m}; windows that reach {least} rows far need as many in a tile"
      )
    return
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
