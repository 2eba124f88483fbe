"""Convolutions whose windows slide over rows of x: implicit matrix products.

A convolution of stride 1 that keeps the size of its image needs no patches in memory. Its rows of x
are pixels, and a window position is an offset among them:

    row of pixel (h, w):  ((image / G * H + h) * W + w) * G + image % G
    position (dh, dw):    (dh * W + dw) * G rows further, and the code of zero beyond the border

Of G images all first pixels come first, then all second ones: with G = 1 rows go image by image,
with all images of a batch they go pixel by pixel, and a position is a block of rows further.

Rows of K are (shift block, window position, channel), so that a position of a block is a run of
channels as they lie in x:

    block 0:  [position 0: c7 c2 ...] [position 1: c7 c2 ...] ...   block 1: ...

A block of fewer channels than a register has lanes holds each of them several times in a row, and
as many positions side by side; here two:

    x:        c7 c7 c2 c2 ...
    block 0:  [positions 0, 1: c7 at 0, c7 at 1, c2 at 0, c2 at 1 ...] [positions 2, 3: ...] ...
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexiq_jax.kernels.operands import Activations, Weights

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
  """Where a window looks.

  Attributes:
    height, width: pixels of an image, of the input and of the result.
    offsets: (dh, dw) of each position, in the order of rows of K; reaching less than an image.
    images: G, of how many images the same pixels lie next to each other.
  """

  height: int
  width: int
  offsets: tuple[tuple[int, int], ...]
  images: int = 1

  def __post_init__(self):
    for name in ("height", "width", "images"):
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise ValueError(f"window.{name}: {value!r}; a positive integer is accepted")
    if not self.offsets:
      raise ValueError("window.offsets: empty; at least one position is accepted")

  def steps(self, copies: int) -> int:
    """How many rows of w each column of x has, with so many positions side by side."""
    return -(-len(self.offsets) // copies)

  @property
  def pixels(self) -> int:
    """Rows of x of an image."""
    return self.height * self.width

  @property
  def rows(self) -> tuple[int, ...]:
    """How many rows further each position is."""
    return tuple((dh * self.width + dw) * self.images for dh, dw in self.offsets)

  @property
  def reach(self) -> int:
    """The largest distance in rows."""
    return max(map(abs, self.rows))


def check(x: Activations, w: Weights, window: Window | None) -> None:
  """Checks that a window belongs to its operands.

  Raises:
    ValueError: naming the field, what it is and what was expected.
  """
  positions = 1 if window is None else len(window.offsets)
  if w.taps != positions:
    raise ValueError(
      f"window: {positions} positions; weights laid out for {w.taps} take as many (see w.taps)"
    )
  if window is not None and x.x8.shape[0] % (window.pixels * window.images):
    raise ValueError(
      f"x8: {x.x8.shape[0]} rows; a multiple of the window's {window.height} x {window.width} "
      f"pixels of {window.images} images is accepted"
    )


def unfold(x: Activations, w: Weights, window: Window) -> Activations:
  """Rows of pixels -> rows of patches, `[M, K]`, as any matrix product takes them.

  What kernels that know windows never write to memory.
  """
  low = jnp.arange(x.x8.shape[1], dtype=jnp.int32) < x.boundary
  zero8, zero4 = (-128, -8) if w.offset else (0, 0)
  x8 = _unfold(x.x8, jnp.where(low, 0, zero8), w, window)
  # By way of int8: not every backend slices and pads int4.
  x4 = _unfold(x.x4.astype(jnp.int8), jnp.where(low, zero4, 0), w, window)
  return dataclasses.replace(x, x8=x8, x4=x4.astype(jnp.int4))


def _unfold(codes: Array, fill: Array, w: Weights, window: Window) -> Array:
  height, width = window.height, window.width
  images = codes.reshape(-1, height, width, window.images, codes.shape[1])
  reach = [max(abs(offset[axis]) for offset in window.offsets) for axis in (0, 1)]
  padded = jnp.broadcast_to(
    fill.astype(codes.dtype),
    (len(images), height + 2 * reach[0], width + 2 * reach[1], *images.shape[3:]),
  )
  padded = padded.at[:, reach[0] : reach[0] + height, reach[1] : reach[1] + width].set(images)
  positions = [
    padded[:, reach[0] + dh : reach[0] + dh + height, reach[1] + dw : reach[1] + dw + width]
    for dh, dw in window.offsets
  ]
  turn = jnp.arange(codes.shape[1]) % w.copies
  steps = []
  for first in range(0, len(positions), w.copies):
    side_by_side = positions[first : first + w.copies]
    step = side_by_side[0].reshape(codes.shape)
    for i, one in enumerate(side_by_side[1:], 1):
      step = jnp.where(turn == i, one.reshape(codes.shape), step)
    steps.append(step.reshape(len(codes), -1, w.block // w.steps))
  # [M, blocks, steps, columns of a block] -> [M, K]
  return jnp.stack(steps, axis=2).reshape(len(codes), -1)


def neighbours(window: Window, rows: int) -> tuple[list[tuple[int, int]], np.ndarray]:
  """Which pixels, image by image, have a neighbour at each step that the window makes.

  Returns:
    The steps (dimension, distance), and bool `[steps, rows]`. A position (dh, dw) lies in the image
    where both of its steps do.
  """
  steps = sorted({(axis, o[axis]) for o in window.offsets for axis in (0, 1) if o[axis]})
  row = np.arange(rows)
  place = (row // window.width % window.height, row % window.width)
  size = (window.height, window.width)
  inside = [(place[a] + d >= 0) & (place[a] + d < size[a]) for a, d in steps]
  return steps, np.array(inside, bool).reshape(len(steps), rows)
