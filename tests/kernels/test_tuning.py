"""Tile sizes by device kind, and the fastest ones; a made-up clock, no accelerator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import kernels
from flexiq_jax.kernels import gpu, tile_files, tpu, tuning
from flexiq_jax.kernels.tile_files import Shape
from tests.kernels.gpu_for_test import require_hopper
from tests.kernels.operands_for_test import oracle

H100 = "NVIDIA H100 80GB HBM3"
SHAPE = Shape(m=1576, k=384, n=1536, block=128)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "tpu"),
    ("TPU v5p", "tpu"),
    ("TPU v6 lite", "tpu"),
    ("TPU7x", "tpu"),
    ("TPU v7x", "tpu"),
    ("TPU v4", "reference"),
    (H100, "gpu"),
    ("NVIDIA H200", "gpu"),
    ("NVIDIA A100-SXM4-80GB", "reference"),
    ("cpu", "reference"),
  ],
)
def test_device_kinds(kind, name):
  assert tile_files.implementation(kind) == name
  tiles = tuning.heuristic(kind, SHAPE)
  assert {"tpu": tpu.Tiles, "gpu": gpu.Tiles, "reference": type(None)}[name] is type(tiles)
  options = tuning.candidates(kind, SHAPE)
  assert options[:1] == ([] if tiles is None else [tiles])
  assert len(options) == len(set(options)) and len(options) != 1


@pytest.mark.parametrize("n", [64, 100, 384, 1000, 3072])
@pytest.mark.parametrize("m", [1, 50, 1576])
def test_candidates_of_a_gpu_are_legal(m, n):
  for tiles in tuning.candidates(H100, Shape(m=m, k=384, n=n, block=64)):
    gpu.tiling.check_tiles(tiles, -(-n // 64) * 64)
    assert tiles.m < m + 64


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU7x"])
@pytest.mark.parametrize(("k", "block"), [(384, 128), (768, 256), (3072, 384)])
def test_candidates_of_a_tpu_are_legal(kind, k, block):
  options = tuning.candidates(kind, Shape(m=1576, k=k, n=768, block=block))
  assert len(options) > 3
  for tiles in options:
    tpu.check_tiles(tiles, k, block)


def clock(best):
  """Seconds that are least for the tiles `best`; small rings do not run."""

  def seconds(shape, tiles):
    if tiles.buffers == 2:
      raise ValueError("exceeds available shared memory")
    return shape.m * (1.0 if tiles == best else 2.0)

  return seconds


def test_autotune_keeps_the_fastest(tmp_path):
  best = gpu.Tiles(m=64, n=128, groups=1, buffers=4)
  lines = []
  tuned = tuning.autotune(
    [SHAPE], tmp_path / "new", kind=H100, seconds=clock(best), progress=lines.append
  )
  assert tuned == {
    SHAPE: tile_files.Tuned(tiles=best, seconds=SHAPE.m, heuristic_seconds=2 * SHAPE.m),
  }
  assert len(lines) == 1 and "2.00x the heuristic's speed" in lines[0]
  assert tile_files.load(tmp_path / "new", H100) == tuned
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["nvidia-h100-80gb-hbm3.json"]


def test_autotune_adds_to_a_file(tmp_path):
  best = gpu.Tiles(m=64, n=128, groups=1, buffers=4)
  other = dataclasses.replace(SHAPE, m=50)
  tuning.autotune([SHAPE], tmp_path, kind=H100, seconds=clock(best))
  tuned = tuning.autotune([other], tmp_path, kind=H100, seconds=clock(best))
  assert set(tuned) == {SHAPE, other} == set(tile_files.load(tmp_path, H100))
  assert tile_files.load(tmp_path, "TPU v5 lite") == {}


def test_a_heuristic_that_does_not_run_is_no_obstacle(tmp_path):
  first = tuning.heuristic(H100, SHAPE)

  def seconds(shape, tiles):
    if tiles == first:
      raise NotImplementedError
    return 1.0

  assert (
    tuning.autotune([SHAPE], tmp_path, kind=H100, seconds=seconds)[SHAPE].heuristic_seconds is None
  )
  assert tile_files.load(tmp_path, H100)[SHAPE].heuristic_seconds is None


def test_tpu_tiles_survive_the_file(tmp_path):
  kind = "TPU v6 lite"
  tuned = tuning.autotune([SHAPE], tmp_path, kind=kind, seconds=lambda shape, tiles: tiles.m)
  assert isinstance(tuned[SHAPE].tiles, tpu.Tiles)
  assert tile_files.load(tmp_path, kind) == tuned


def test_autotune_refuses(tmp_path):
  with pytest.raises(NotImplementedError, match="device 'cpu' runs the reference"):
    tuning.autotune([SHAPE], tmp_path, kind="cpu")

  def nothing_runs(shape, tiles):
    raise ValueError("too large")

  with pytest.raises(ValueError, match=r"Shape\(m=1576.*none of the candidates ran"):
    tuning.autotune([SHAPE], tmp_path, kind=H100, seconds=nothing_runs)
  assert not list(tmp_path.iterdir())


def test_example_is_half_in_4_bits():
  x, w, epilogue = tuning.example(Shape(m=3, k=256, n=5, block=64))
  assert x.boundary == 128
  epilogue = dataclasses.replace(epilogue, out="float32")
  got = kernels.mixed_matmul(x, w, epilogue, implementation="reference")
  np.testing.assert_array_equal(np.asarray(got), oracle(x, w))
  assert x.x8[:, 128:].any() and x.x4.astype(jnp.int8)[:, :128].any()


@pytest.mark.gpu
def test_autotune_on_hardware(tmp_path):
  require_hopper()
  tuned = tuning.autotune([Shape(m=256, k=256, n=128, block=128)], tmp_path)
  assert tile_files.load(tmp_path, jax.devices()[0].device_kind) == tuned
