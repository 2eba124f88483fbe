"""Files of measured tiles, and products that take them."""

import dataclasses
import json

import numpy as np
import pytest

from flexiq_jax import kernels
from flexiq_jax.kernels import gpu, tile_files, tpu, tuning
from flexiq_jax.kernels.tile_files import Shape
from flexiq_jax.kernels.tpu.tiling import Tiles
from tests.kernels.operands_for_test import oracle

H100 = "NVIDIA H100 80GB HBM3"
SHAPE = Shape(m=1576, k=384, n=1536, block=128)


GOOD = {
  "version": 1,
  "device": H100,
  "tuned": [
    {
      "shape": {"m": 64, "k": 128, "n": 64, "block": 128},
      "tiles": {"m": 64, "n": 64, "groups": 1, "buffers": 2},
      "seconds": 1.0,
      "heuristic_seconds": 1.0,
    }
  ],
}


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (None, "no file of tuned tiles"),
    ({"version": 2}, "version 2; 1 is accepted"),
    ({"device": "NVIDIA H200"}, "tuned on 'NVIDIA H200', this is for"),
    ({"tuned": [{}]}, "an entry cannot be read"),
    ({"tuned": [GOOD["tuned"][0] | {"tiles": {"m": 60, "n": 64}}]}, "tiles.m: 60"),
    ({"tuned": [GOOD["tuned"][0] | {"tiles": {"m": 64, "n": 64, "k": 3}}]}, "cannot be read"),
    ({"tuned": [GOOD["tuned"][0] | {"shape": {"m": 0, "k": 1, "n": 1, "block": 1}}]}, "shape.m: 0"),
  ],
)
def test_damaged_files_are_refused(tmp_path, change, match):
  path = tile_files.file_of(tmp_path, H100)
  path.write_text(json.dumps(GOOD))
  assert len(tile_files.load(tmp_path, H100)) == 1
  path.write_text("{" if change is None else json.dumps(GOOD | change))
  with pytest.raises(ValueError, match=match) as error:
    tile_files.load(tmp_path, H100)
  assert str(path) in str(error.value)


def test_shapes_are_checked():
  with pytest.raises(ValueError, match="100; a divisor of k = 384"):
    dataclasses.replace(SHAPE, block=100)
  with pytest.raises(ValueError, match=r"shape\.n: 2\.0"):
    dataclasses.replace(SHAPE, n=2.0)


def test_tiles_of_a_device(tmp_path):
  tuned = tuning.autotune([SHAPE], tmp_path, kind=H100, seconds=lambda shape, tiles: tiles.m)
  assert tile_files.read(tmp_path, H100) == {SHAPE: tuned[SHAPE].tiles}


@pytest.mark.parametrize(
  ("kind", "match"),
  [
    ("NVIDIA H200", r"nvidia-h200.json does not exist.*in the folder: tpu-v6-lite.json\. Measure"),
    (None, "device 'cpu' runs the reference, which has no tiles; name no folder"),
  ],
)
def test_a_device_without_tiles_is_refused(tmp_path, kind, match):
  tuning.autotune([SHAPE], tmp_path, kind="TPU v6 lite", seconds=lambda shape, tiles: 1.0)
  with pytest.raises(ValueError, match=match):
    tile_files.read(tmp_path, kind)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
  with pytest.raises(ValueError, match="in the folder: no file"):
    tile_files.read(tmp_path / "none", H100)


@pytest.mark.parametrize("m", [64, 320])
def test_a_product_takes_the_tiles_of_its_shape(tmp_path, monkeypatch, m):
  """In interpret mode; a shape that is not in the file takes tiles by rule."""
  kind, shape = "TPU v5 lite", Shape(m=320, k=512, n=256, block=128)
  own = Tiles(m=256, n=128, k=128)
  assert tuning.heuristic(kind, shape) != own
  tuning.autotune([shape], tmp_path, kind=kind, seconds=lambda _, tiles: float(tiles != own) + 1)
  taken, run = [], tpu.mixed_matmul

  def spy(*args, tiles, **options):
    taken.append(tiles)
    return run(*args, tiles=tiles, **options)

  monkeypatch.setattr(tpu, "mixed_matmul", spy)
  x, w, epilogue = tuning.example(dataclasses.replace(shape, m=m))
  epilogue = dataclasses.replace(epilogue, out="float32")
  tuned = tile_files.read(tmp_path, kind)
  y = kernels.mixed_matmul(x, w, epilogue, implementation="tpu", tuned=tuned, interpret=True)
  np.testing.assert_array_equal(np.asarray(y), oracle(x, w))
  assert taken == [own if m == 320 else None]


def test_weights_laid_out_for_a_gpu_have_the_shape_that_was_measured():
  """Their padding does not count."""
  shape = Shape(m=8, k=192, n=100, block=64)
  x, w, _ = tuning.example(shape)
  tuned = {shape: "its tiles"}
  assert tile_files.choose(tuned, x, w) == "its tiles"
  assert gpu.prepare(w).w8.shape == (128, 256)
  assert tile_files.choose(tuned, x, gpu.prepare(w)) == "its tiles"
  assert tile_files.choose({}, x, w) is tile_files.choose(None, x, w) is None
