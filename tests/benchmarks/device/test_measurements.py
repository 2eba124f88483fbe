"""What the steps measure: which shapes, how times are taken, what is compared."""

import dataclasses
import functools
import json
import time

import jax
import numpy as np
import pytest

from benchmarks.device import (
  convolutions,
  hardware_tests,
  main_job,
  products,
  profiles,
  shapes,
  tiles,
  timing,
  whole_models,
)
from benchmarks.device.context import Context
from flexiq_jax.kernels import tile_files


def test_shapes_of_products_are_those_that_deployed_models_ask_for():
  found = shapes.products("resnet50", "gpu")
  layers = [name for p in found for name in p.name.split(",")]
  assert len(layers) == len({*layers}) == 52  # all convolutions but the first
  three = next(p for p in found if p.taps == 9 and p.channels == 64)
  assert (three.m, three.k, three.n, three.block) == (56 * 56, 576, 64, 576)
  wide = next(p for p in shapes.products("vit_b", "gpu") if p.k == 3072)
  assert (wide.m, wide.n, wide.block, wide.boundaries) == (197, 768, 64, (0, 768, 1536, 2304, 3072))
  work = [p.m * p.k * p.n * (1 + p.name.count(",")) for p in found]
  assert work == sorted(work, reverse=True)


def test_the_order_of_products_begins_with_every_model(tmp_path):
  context = Context(step="products", folder=tmp_path, seconds=1.0)
  work = products.order(context, "gpu", "H100", None)
  assert {name for name, *_ in work[:6]} == {*shapes.NAMES}
  count = sum(len(shapes.products(name, "gpu")) for name in shapes.NAMES)
  assert len(work) == len({(n, b, p) for n, b, p in work}) == count * len(shapes.BATCHES)
  shape = tile_files.Shape(m=8 * 197, k=3072, n=768, block=64)
  tuned = products.order(context, "gpu", "H100", {shape: None})
  assert [(name, batch) for name, batch, _ in tuned] == [("vit_b", 8)]


def test_what_a_perfect_kernel_would_wait_for():
  product = dataclasses.replace(shapes.products("vit_b", "gpu")[0], m=1, k=1024, n=1024)
  product = dataclasses.replace(product, boundaries=(0, 256, 512, 768, 1024))
  row = {"times": {name: {"us": 10.0} for name in ("mixed 0 %", "mixed 100 %", "torch_int8")}}
  ceilings = {"int8_top_s": 1000.0, "copy_gb_s": 1000.0, "bfloat16_tflop_s": 500.0}
  products.bounds(row, product, 1, ceilings)
  moved = 1024 + 1024 * 1024
  times = row["times"]
  assert times["mixed 0 %"]["share"] == pytest.approx((moved + 2048) / 1e6 / 10)
  assert times["mixed 100 %"]["share"] == pytest.approx((moved / 2 + 2048) / 1e6 / 10)
  assert times["torch_int8"]["share"] == pytest.approx((moved + 4096) / 1e6 / 10)
  assert {t["binds"] for t in times.values()} == {"memory"}
  products.bounds(row, product, 100_000, ceilings | {"copy_gb_s": 4000.0})
  assert {t["binds"] for t in times.values()} == {"compute"}


class Sleeper:
  """A run whose calls take a known time."""

  def __init__(self, seconds: float):
    self.calls, self._seconds = 2, seconds

  def warm(self):
    if self._seconds < 0:
      raise RuntimeError("not on this machine\nand more")

  def chain(self, repeats):
    time.sleep(repeats * self.calls * self._seconds)

  def single(self):
    time.sleep(3 * self._seconds)


def test_times_are_of_one_call_and_ratios_of_the_same_round():
  runs = {"slow": Sleeper(4e-3), "quick": Sleeper(2e-3), "never": Sleeper(-1)}
  ready, refused = timing.warm_all(runs)
  assert [*ready] == ["slow", "quick"]
  assert refused == {"never": "RuntimeError: not on this machine"}
  found = timing.measure(ready, 0.0, base="slow", rounds=(3, 9), span=0.01)
  assert found["slow"].rounds == 3 and found["slow"].ratio == 1.0
  assert 4e3 <= found["slow"].us < 12e3 and found["quick"].us < found["slow"].us
  assert found["quick"].ratio < 1.0 and found["slow"].latency_us > found["slow"].us


def test_chains_multiply_each_copy_of_the_weights():
  function = jax.jit(lambda x, w: x @ w)
  x, w = np.ones((2, 3), np.float32), jax.numpy.arange(12.0).reshape(3, 4)
  chains = timing.Chains()
  runs = [chains.run(functools.partial(function, x * scale, w), 3) for scale in (1, 2)]
  assert runs[0].calls == 3
  outputs = runs[1]._chain(runs[1]._groups)
  assert len(outputs) == 3
  for y in outputs:
    np.testing.assert_array_equal(y, 2 * x @ np.asarray(w))
  pointers = {group[1].unsafe_buffer_pointer() for group in runs[0]._groups}
  assert len(pointers) == 3, "each call has weights of its own"
  assert runs[0]._chain is runs[1]._chain, "one executable for all levels"
  assert timing.copies_for(1) == timing.COPIES[1] and timing.copies_for(2**30) == timing.COPIES[0]


def test_oracle_of_convolutions():
  shape = shapes.Convolution(side=5, channels=3, outputs=2, window=3, stride=2)
  rng = np.random.default_rng(0)
  x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((1, 5, 5, 3), (3, 3, 3, 2)))
  got = convolutions.oracle(shape, x, w)
  padded = np.pad(x.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = [
    [
      np.einsum("hwc,hwcn->n", padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], w.astype(np.int64))
      for j in range(3)
    ]
    for i in range(3)
  ]
  np.testing.assert_array_equal(got[0], expected)


def test_outcome_of_the_hardware_tests():
  text = "PASSED tests/a.py::b\nFAILED tests/a.py::c - assert 1\nSKIPPED [1] tests/a.py: no\n"
  found = hardware_tests.outcome(text, 1)
  assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
  assert found["claims"][0]["result"] == "1 passed, 1 failed, 1 skipped"
  assert not hardware_tests.outcome("", None)["complete"]


def test_runs_of_the_main_job_are_compared(tmp_path):
  recipe = {"order": ["a#0", "a#1"], "layers": [{"name": "a", "x_scale": 0.5}]}
  other = {"order": ["a#1", "a#0"], "layers": [{"name": "a", "x_scale": 0.51}]}
  rows = "method,ratio,seed,top1\nfloat,,0,82.0\nflexiq,0.5,0,{}\n"
  for name, content, top1 in (("cpu", recipe, 80.0), ("device", other, 79.5)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(content))
    (folder / "results.csv").write_text(rows.format(top1))
  found = main_job.compare(tmp_path / "cpu", tmp_path / "device")
  assert not found["recipe_equal"] and found["order_differs"] == 2
  assert found["x_scale_differs"] == pytest.approx(0.02)
  assert (found["top1_differs"], found["rows"], found["rows_missing"]) == (0.5, 2, 0)
  assert main_job.compare(tmp_path / "cpu", tmp_path / "cpu")["recipe_equal"]


def test_a_shape_is_tuned_within_its_time(monkeypatch, tmp_path):
  kind = "NVIDIA H100 80GB HBM3"
  monkeypatch.setattr(tile_files, "present", lambda: kind)
  shape = tile_files.Shape(m=8 * 197, k=768, n=3072, block=64)
  seen = []

  def compile(self, shape, candidates):
    seen.extend(candidates)
    self._runs = {t: Sleeper(1e-3 if t.m == 64 else 2e-3) for t in candidates[:4]}
    self._runs[candidates[0]] = ValueError("too much shared memory")

  monkeypatch.setattr(tiles.Clock, "_compile", compile)
  clock = tiles.Clock(1.0)
  found = tiles.tuning.autotune([shape], tmp_path, kind=kind, seconds=clock.seconds)[shape]
  assert (clock.tried, clock.refused) == (3, 1)
  assert found.tiles in seen[1:4] and found.heuristic_seconds is None
  sizes = [(t.m, t.n, t.groups) for t in seen[1:]]
  assert len(sizes) == len({*sizes}), "one depth of buffers of each size"
  assert seen[0] == tiles.tuning.heuristic(kind, shape)
  work = tiles.wanted("gpu", kind)
  assert work[0].m == 8 * 197 and len(work) == len({*work})


def test_rows_of_a_model_have_all_ratios():
  class Runner:
    def __init__(self):
      self.at = []

    def switch(self, ratio):
      self.at.append(ratio)

    def wait(self):
      pass

    def __call__(self, x):
      return jax.numpy.zeros((len(x), 2))

  runner = Runner()
  found = whole_models.rows(runner, np.zeros((3, 4), np.float32), 0.0, 9)
  assert [row["ratio"] for row in found] == [*shapes.LEVELS]
  assert runner.at == [*shapes.LEVELS] * 2, "all ratios in turn, two rounds at least"
  assert {(row["batch"], row["calls"], row["device_calls"]) for row in found} == {(3, 4, 8)}
  assert {*profiles.FIELDS} <= found[0].keys() and found[0]["queued_us"] > 0
