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


def window(height, width, offsets=SQUARE):
  return Window(height=height, width=width, offsets=offsets)


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
  for m in range(len(x8)):
    image, h, v = m // place.pixels, m // place.width % place.height, m % place.width
    for j in range(len(w8) // w.block):
      inside = slice(j * columns, (j + 1) * columns)
      product = np.zeros(w8.shape[1], np.int64)
      for t, (dh, dw) in enumerate(place.offsets):
        a, b = h + dh, v + dw
        known = 0 <= a < place.height and 0 <= b < place.width
        row = (image * place.height + a) * place.width + b
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


def check(x, w, place, **kernel):
  e = raw(w.w8.shape[1])
  expected = oracle(x, w, place) + np.asarray(e.correction)
  got = kernels.mixed_matmul(x, w, e, window=place, implementation="reference")
  np.testing.assert_array_equal(got, expected)
  got = tpu.mixed_matmul(x, w, e, place, interpret=True, **kernel)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
  ("boundary", "signed"), [(0, False), (60, True), (128, False), (200, False), (256, True)]
)
def test_every_boundary(boundary, signed):
  place = window(4, 8)
  check(*convolution(boundary, 3, place, 128, 2, 128, boundary, signed=signed), place)


@pytest.mark.parametrize(
  ("height", "width", "images"),
  [
    (7, 7, 3),  # rows of several images in one register, and padded ones
    (1, 1, 64),
    (9, 3, 5),
  ],
)
def test_images_of_any_size(height, width, images):
  place = window(height, width)
  check(*convolution(height, images, place, 5, 1, 128, 70, signed=False), place)


@pytest.mark.parametrize(("copies", "boundary"), [(2, 60), (8, 128), (16, 64)])
def test_several_positions_side_by_side(copies, boundary):
  place = window(5, 7)
  x, w = convolution(copies, 2, place, 128, 1, 128, boundary, copies, signed=False)
  # What has no position has no weight.
  left = np.arange(len(w.w8)) % copies + np.arange(len(w.w8)) // 128 * copies >= w.taps
  w = dataclasses.replace(
    w,
    w8=jnp.where(left[:, None], 0, w.w8),
    w4=packing.pack(jnp.where(left[:, None], 0, packing.unpack(w.w4)).astype(jnp.int32)),
  )
  check(x, w, place)


@pytest.mark.parametrize(
  "offsets",
  [
    SQUARE[::-1],
    tuple((0, dw) for dw in range(-3, 4)),
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


def test_requantized_for_the_next_layer():
  place, rng = window(8, 8), np.random.default_rng(0)
  x, w = convolution(4, 2, place, 128, 2, 128, 128, signed=False)
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
  got = tpu.mixed_matmul(x, w, e, place, interpret=True)
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
