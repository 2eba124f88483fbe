"""Convolutions without patches in memory: the reference and the TPU kernel against int64 sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import kernels
from flexiq_jax.kernels import Requantize, packing, reference, tpu, windows
from flexiq_jax.kernels.windows import Window
from tests.kernels.operands_for_test import operands, raw

SQUARE = tuple((dh, dw) for dh in (-1, 0, 1) for dw in (-1, 0, 1))


def window(height, width, offsets=SQUARE, images=1):
  return Window(height=height, width=width, offsets=offsets, images=images)


def convolution(seed, images, place, n, blocks, channels, boundary, copies=1, **traits):
  """Random operands: pixels in rows, and weights for each position."""
  taps = len(place.offsets)
  x, _ = operands(seed, images * place.pixels, 1, blocks, channels, boundary, **traits)
  _, w = operands(seed + 1, 1, n, blocks, channels * -(-taps // copies), 0, **traits)
  return x, dataclasses.replace(w, taps=taps, copies=copies)


def oracle(x, w, place):
  """int64 `[M, N]`: pixel by pixel, position by position, block by block."""
  columns = w.block // w.steps
  w4 = np.asarray(packing.unpack(w.w4)).astype(np.int64)
  w8 = np.asarray(w.w8).astype(np.int64)
  x4, x8 = (np.asarray(a.astype(jnp.int8)).astype(np.int64) for a in (x.x4, x.x8))
  low = np.arange(x8.shape[1]) < int(x.boundary)
  nothing4, nothing8 = np.where(low, -w.offset, 0), np.where(low, 0, -16 * w.offset)
  w_shift, x_shift = np.asarray(w.w_shift), np.asarray(w.x_shift)
  total = np.zeros((len(x8), w8.shape[1]), np.int64)
  side_by_side = place.images
  for m in range(len(x8)):
    pixel, image = m // side_by_side % place.pixels, m % side_by_side
    before, (h, v) = m // side_by_side // place.pixels, divmod(pixel, place.width)
    for j in range(len(w8) // w.block):
      inside = slice(j * columns, (j + 1) * columns)
      product = np.zeros(w8.shape[1], np.int64)
      for t, (dh, dw) in enumerate(place.offsets):
        a, b = h + dh, v + dw
        known = 0 <= a < place.height and 0 <= b < place.width
        row = ((before * place.height + a) * place.width + b) * side_by_side + image
        # Columns that hold this position, and their rows of w in its step.
        at = np.arange(inside.start, inside.stop)[t % w.copies :: w.copies]
        of = j * w.block + t // w.copies * columns + at - inside.start
        product += (x4[row, at] if known else nothing4[at]) @ w4[of]
        total[m] += (x8[row, at] if known else nothing8[at]) @ w8[of]
        if x.row_shift is not None:
          product += w.offset * w4[of][low[at]].sum(axis=0)
      shift = x_shift[j] if x.row_shift is None else int(np.asarray(x.row_shift)[m, j])
      total[m] += product << (shift + w_shift[j])
  return total


def without_unused(w):
  """No weights where copies have no position."""
  columns = w.block // w.steps
  row = np.arange(len(w.w8)) % w.block
  left = (row % columns % w.copies + row // columns * w.copies >= w.taps)[:, None]
  w4 = jnp.where(left, 0, packing.unpack(w.w4)).astype(jnp.int32)
  return dataclasses.replace(w, w8=jnp.where(left, 0, w.w8), w4=packing.pack(w4))


def check(x, w, place, **kernel):
  e = raw(w.w8.shape[1])
  expected = oracle(x, w, place) + np.asarray(e.correction)
  got = kernels.mixed_matmul(x, w, e, window=place, implementation="reference")
  np.testing.assert_array_equal(got, expected)
  got = tpu.mixed_matmul(x, w, e, place, interpret=True, **kernel)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  ("boundary", "signed"),
  [
    *((60, True), (128, False)),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in ((0, False), (200, False), (256, True))
    ),
  ],
)
def test_every_boundary(boundary, signed):
  place = window(4, 8)
  check(*convolution(boundary, 3, place, 128, 2, 128, boundary, signed=signed), place)


@pytest.mark.parametrize(
  ("height", "width", "images"),
  [
    (7, 7, 3),  # rows of several images in one register, and padded ones
    pytest.param(1, 1, 64, marks=pytest.mark.slow),
    pytest.param(9, 3, 5, marks=pytest.mark.slow),
  ],
)
def test_images_of_any_size(height, width, images):
  place = window(height, width)
  check(*convolution(height, images, place, 5, 1, 128, 70, signed=False), place)


@pytest.mark.parametrize(
  ("copies", "boundary"),
  [(2, 60), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 128), (16, 64)))],
)
def test_several_positions_side_by_side(copies, boundary):
  place = window(5, 7)
  x, w = convolution(copies, 2, place, 128, 1, 128, boundary, copies, signed=False)
  check(x, without_unused(w), place)


# Images side by side, K of two blocks where the boundary is beyond 128.
INNERMOST = {
  "three tiles, a boundary in the second block": {
    "place": window(3, 5, images=64),
    "boundary": 200,
    "lines": 1,
  },
  "two positions side by side": {
    "place": window(2, 3, images=64),
    "boundary": 70,
    "copies": 2,
    "lines": 1,
  },
  "a wide unit, signed": {
    "place": window(1, 2, images=128),
    "boundary": 60,
    "kind": "TPU v6 lite",
    "signed": True,
  },
}
MORE = {
  "pieces of a pixel": {"place": window(1, 2, images=320), "boundary": 60, "n": 5},
  "dilated, with shifts chosen at run time": {
    "place": window(4, 2, tuple((a, b) for a in (-2, 0, 2) for b in (-1, 0, 1)), images=64),
    "boundary": 60,
    "lines": 2,
    "dynamic": True,
  },
  "one-sided, all in 8 bits": {
    "place": window(3, 2, ((0, 0), (0, 1), (1, 0), (1, 1)), images=64),
    "boundary": 0,
    "lines": 1,
  },
  "two tiles, all in 4 bits": {"place": window(4, 1, images=64), "boundary": 256, "lines": 2},
}


@pytest.mark.parametrize(
  "name", [*INNERMOST, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_images_innermost(name):
  case = dict((INNERMOST | MORE)[name])
  place, boundary, n = case.pop("place"), case.pop("boundary"), case.pop("n", 128)
  lines, copies, kind = case.pop("lines", 0), case.pop("copies", 1), case.pop("kind", None)
  traits = {"signed": False} | case
  blocks = 2 if boundary > 128 else 1
  x, w = convolution(7, place.images, place, n, blocks, 128, boundary, copies, **traits)
  rows = lines * place.width * place.images
  tiles = tpu.Tiles(m=rows, n=128, k=w.block) if lines else None
  check(x, without_unused(w), place, tiles=tiles, kind=kind)


@pytest.mark.parametrize(
  "offsets",
  [
    pytest.param(SQUARE[::-1], marks=pytest.mark.slow),
    pytest.param(tuple((0, dw) for dw in range(-3, 4)), marks=pytest.mark.slow),
    tuple((dh, dw) for dh in (-2, 0, 2) for dw in (-2, 0, 2)),  # dilated
    ((0, 0), (0, 1), (1, 0), (1, 1)),  # one-sided
  ],
)
def test_windows_of_any_form(offsets):
  place = window(8, 8, offsets)
  check(*convolution(5, 2, place, 128, 1, 128, 60, signed=False), place)


def test_parts_of_an_image_see_their_neighbours():
  place = window(16, 16)
  x, w = convolution(1, 2, place, 128, 2, 128, 128, signed=False)
  assert tpu.tiling.margin(place) == 64
  check(x, w, place, tiles=tpu.Tiles(m=64, n=128, k=w.block))


def test_several_tiles_of_whole_images():
  place = window(4, 8)
  x, w = convolution(2, 5, place, 300, 1, 256, 128, signed=False)
  check(x, w, place, tiles=tpu.Tiles(m=64, n=128, k=w.block))


def test_shifts_chosen_at_run_time():
  place = window(4, 8)
  check(*convolution(3, 2, place, 128, 2, 128, 200, signed=False, dynamic=True), place)


@pytest.mark.parametrize(
  ("place", "kind"),
  [
    (window(8, 8), None),
    (window(2, 1, images=64), None),
    pytest.param(window(3, 1, images=64), "TPU v6 lite", marks=pytest.mark.slow),
  ],
)
def test_requantized_for_the_next_layer(place, kind):
  rng = np.random.default_rng(0)
  x, w = convolution(4, max(2, place.images), place, 128, 2, 128, 128, signed=False)
  e = dataclasses.replace(
    raw(128),
    scale=jnp.asarray(rng.uniform(2e-6, 1e-5, 128), jnp.float32),
    out="float32",
    activation="relu",
    requantize=Requantize(
      scale=jnp.float32(0.01),
      boundary=jnp.int32(64),
      shift=jnp.asarray(rng.integers(0, 5, 128), jnp.int32),
      signed=False,
    ),
  )
  expected = reference.mixed_matmul(x, w, e, place)
  got = tpu.mixed_matmul(x, w, e, place, interpret=True, kind=kind)
  for a, b in ((got.x8, expected.x8), (got.x4, expected.x4)):
    difference = np.asarray(a.astype(jnp.int32) - b.astype(jnp.int32))
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-3


def test_unused_precision_is_never_read():
  place = window(4, 8)
  x, w = convolution(0, 2, place, 128, 3, 128, 128, signed=False)
  run = lambda x: tpu.mixed_matmul(x, w, raw(128), place, interpret=True)
  spoiled = dataclasses.replace(
    x, x8=x.x8.at[:, :128].set(77), x4=x.x4.at[:, 128:].set(jnp.int4(5))
  )
  np.testing.assert_array_equal(run(spoiled), run(x))


def test_vmap_over_activations():
  place = window(4, 8)
  x, w = convolution(8, 4, place, 128, 1, 128, 60, signed=False)
  run = lambda x8, x4: tpu.mixed_matmul(
    dataclasses.replace(x, x8=x8, x4=x4), w, raw(128), place, interpret=True
  )
  got = jax.vmap(run)(x.x8.reshape(2, 64, 128), x.x4.reshape(2, 64, 128)).reshape(128, 128)
  np.testing.assert_array_equal(got, oracle(x, w, place) + np.asarray(raw(128).correction))


@pytest.mark.parametrize(
  ("height", "width", "rows", "tile"),
  [
    (56, 56, None, 3136),
    (28, 28, 128 * 784, 3136),  # four images
    (14, 14, 8 * 196, 1600),  # all of them in one tile
    (7, 7, 128 * 49, 3136),
    (112, 112, None, 1792),  # parts of an image
    (8, 8, None, 2048),
  ],
)
def test_tiles_of_real_images(height, width, rows, tile):
  assert tpu.window_rows(window(height, width), rows) == tile


def test_images_that_no_tile_fits():
  with pytest.raises(NotImplementedError, match=r"window: images of 75 x 75 pixels"):
    tpu.window_rows(window(75, 75))


@pytest.mark.parametrize(
  ("side", "columns", "n", "lines"),
  [(56, 128, 128, 8), (28, 128, 128, 14), (14, 256, 256, 7), (7, 512, 512, 7)],
)
def test_tiles_of_a_batch(side, columns, n, lines):
  by_image, steps = window(side, side), 5 if side == 56 else 9
  of = lambda images: tpu.of_batch(by_image, images, columns, n)
  assert of(8) == of(100) == of(64 * 64) == by_image
  place = of(128)
  assert place == dataclasses.replace(by_image, images=128)
  k, block = columns * steps, min(columns, 256) * steps
  how = {"window": place, "copies": 2 if side == 56 else 1}
  tiles = tpu.choose_tiles(128 * side * side, k, n, block, **how)
  assert tiles.m == lines * side * 128
  # Of chips with less memory: fewer lines, if any.
  assert tpu.choose_tiles(128 * side * side, k, n, block, "TPU v5p", **how).m <= tiles.m


def test_lines_of_other_tiles_are_bytes():
  place = window(8, 4, images=64)
  sweep = tpu.Sweep(
    shape=(64 * 32, 9 * 128, 128),
    tiles=tpu.Tiles(m=2 * 4 * 64, n=128, k=9 * 128),
    block=9 * 128,
    activation="relu",
    out="bfloat16",
    signed=None,
    granule=0,
    dynamic=False,
    vectors=(),
    interpret=False,
    window=place,
  )
  # Four tiles: six times the line beside them.
  assert tpu.traffic(sweep, 0).x == (64 * 32 + 6 * 4 * 64) * 128


def test_bytes_follow_the_boundary():
  place, low = window(56, 56), []
  for boundary in (0, 64, 128):
    sweep = tpu.Sweep(
      shape=(128 * 3136, 9 * 128, 128),
      tiles=tpu.choose_tiles(128 * 3136, 9 * 128, 128, 9 * 128, window=place),
      block=9 * 128,
      activation="relu",
      out="bfloat16",
      signed=None,
      granule=0,
      dynamic=False,
      vectors=(),
      interpret=False,
      window=place,
    )
    low.append(tpu.traffic(sweep, boundary))
  assert [t.x for t in low] == [128 * 3136 * 128 * f // 2 for f in (2, 3, 1)]
  assert [t.w for t in low] == [9 * 128 * 128 * f // 2 for f in (2, 3, 1)]


def test_bad_inputs():
  place = window(4, 8)
  x, w = convolution(0, 2, place, 128, 1, 128, 0)
  run = lambda w=w, window=place, **how: kernels.mixed_matmul(x, w, raw(128), window=window, **how)
  with pytest.raises(ValueError, match=r"window: 1 positions; weights laid out for 9"):
    run(window=None)
  with pytest.raises(ValueError, match=r"x8: 64 rows; a multiple of the window's 5 x 5 pixels"):
    run(window=window(5, 5))
  with pytest.raises(ValueError, match=r"x8: 64 rows; .* 4 x 8 pixels of 4 images is accepted"):
    run(window=window(4, 8, images=4))
  with pytest.raises(NotImplementedError, match=r"window: 2 images of 4 x 8 pixels side by side"):
    tpu.mixed_matmul(x, w, raw(128), window(4, 8, images=2), interpret=True)
  many = window(2, 2, images=64)
  pixels, _ = convolution(0, 64, many, 1, 1, 128, 0)
  with pytest.raises(NotImplementedError, match=r"tiles.m: 64 with 256 rows, 64 images side by"):
    tiles = tpu.Tiles(m=64, n=128, k=w.block)
    tpu.mixed_matmul(pixels, w, raw(128), many, tiles=tiles, interpret=True)
  with pytest.raises(ValueError, match=r"taps, copies: 7 and 1; rows of a shift block, 1152, "):
    run(w=dataclasses.replace(w, taps=7))
  with pytest.raises(NotImplementedError, match=r"window: 'gpu' takes patches"):
    run(implementation="gpu", platform="gpu")
  with pytest.raises(ValueError, match=r"window.height: 0; a positive integer"):
    window(0, 4)
  with pytest.raises(ValueError, match=r"window.offsets: empty"):
    window(4, 4, ())
  thrice = dataclasses.replace(w, w8=w.w8[:384], w4=w.w4[:192], block=384, copies=3)
  with pytest.raises(NotImplementedError, match=r"copies: 3; the TPU kernel takes divisors of 128"):
    tpu.mixed_matmul(x, thrice, raw(128), place, interpret=True)
  tiles = tpu.Tiles(m=64, n=128, k=w.block)
  for side in (9, 64):  # no part of 81 pixels; a part that is shorter than windows reach
    images = window(side, side)
    rows, _ = convolution(0, 2, images, 1, 1, 128, 0)
    with pytest.raises(NotImplementedError, match=rf"tiles.m: 64 with images of {side**2} pixels"):
      tpu.mixed_matmul(rows, w, raw(128), images, tiles=tiles, interpret=True)
  eight = window(8, 8, SQUARE[:8])
  small = convolution(0, 1, eight, 128, 2, 64, 0)
  with pytest.raises(NotImplementedError, match=r"block: 64 columns of x; the TPU kernel takes"):
    tpu.mixed_matmul(*small, raw(128), eight, interpret=True)
  with pytest.raises(NotImplementedError, match=r"tiles.k: 128 with windows and shift blocks of"):
    tpu.mixed_matmul(x, w, raw(128), place, tiles=tpu.Tiles(m=64, n=128, k=128), interpret=True)


def test_steps_of_a_window():
  steps, inside = windows.neighbours(window(2, 3), 12)
  assert steps == [(0, -1), (0, 1), (1, -1), (1, 1)]
  np.testing.assert_array_equal(inside[0], [0, 0, 0, 1, 1, 1] * 2)
  np.testing.assert_array_equal(inside[3], [1, 1, 0] * 4)


def test_one_program_for_all_boundaries():
  place, traces = window(8, 8), []

  @jax.jit
  def run(x, w):
    traces.append(1)
    return tpu.mixed_matmul(x, w, raw(128), place, interpret=True)

  for boundary in (0, 100, 128):
    x, w = convolution(6, 1, place, 128, 1, 128, boundary)
    np.testing.assert_array_equal(run(x, w), oracle(x, w, place) + np.asarray(raw(128).correction))
  assert len(traces) == 1
