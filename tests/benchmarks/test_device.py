"""make device: how steps end, what is written, and that the small form of the quick steps runs."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from benchmarks.device import (
  convolutions,
  driver,
  hardware_tests,
  main_job,
  present,
  products,
  profiles,
  records,
  report,
  shapes,
  steps,
  tiles,
  timing,
  whole_models,
)
from benchmarks.device.context import Context
from benchmarks.device.driver import Plan
from benchmarks.device.records import Record
from benchmarks.device.steps import Step
from flexiq_jax.kernels import tile_files

CPU = {"platform": "cpu", "device_kind": "cpu"}
GPU = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "commit": "0123"}


def record(**changes) -> Record:
  facts = {"step": "a", "status": "done", "why": "", "seconds": 1.0, "limit": 2.0}
  return Record(**facts | {"complete": True, "result": {"claims": []}, "tail": ""} | changes)


def summary(machine=GPU, small=False, **changes) -> records.Summary:
  facts = {"version": 1, "made": "measured", "date": "2026-01-02", "command": "c", "seconds": 1.0}
  return records.Summary(**facts | {"small": small, "machine": machine, "steps": [], **changes})


@pytest.fixture
def play(tmp_path, monkeypatch):
  """Runs modules of given texts as steps, on a machine that is said to be this."""

  def run(sources: dict[str, str], machine=CPU, limit=60.0, budget=0.0, **facts):
    package = tmp_path / "benchmarks" / "device"
    package.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
      (package / f"{name}.py").write_text(source)
    # The package's own modules, and these beside them.
    site = tmp_path / "sitecustomize.py"
    site.write_text(
      f"import benchmarks.device\nbenchmarks.device.__path__.append({str(package)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{driver.ROOT}")
    monkeypatch.setattr(driver, "describe", lambda plan: machine)
    limits = {"limit": limit, "small_limit": limit}
    plan = Plan(
      steps=[Step(name=n, module=n, **limits, **facts) for n in sources],
      folder=tmp_path / "out",
      budget=budget,
    )
    return driver.run(plan, say=lambda line: None), tmp_path / "out"

  return run


GOOD = """
def run(context):
  assert context.small and context.left() > 0
  return {"value": 1, "claims": [{"claim": "c", "result": "1"}]}
"""
RAISES = """
def run(context):
  context.save({"value": "half"})
  raise RuntimeError("a mistake of this step")
"""
HANGS = """
import subprocess, time
def run(context):
  context.save({"value": "before"})
  subprocess.Popen(["sleep", "271.25"])
  time.sleep(300)
"""
SKIPS = """
from benchmarks.device.context import Skipped
def run(context):
  raise Skipped("nothing to do here")
"""
DIES = """
import os, signal
def run(context):
  if os.environ.get("FLEXIQ_DEVICE_TORCH") == "0":
    return {"value": "without torch"}
  os.kill(os.getpid(), signal.SIGSEGV)
"""
NONSENSE = """
def run(context):
  return {"claims": [{"claim": "without a result"}]}
"""


def test_every_way_a_step_can_end_is_recorded_and_the_others_go_on(play):
  sources = {"good": GOOD, "raises": RAISES, "skips": SKIPS, "nonsense": NONSENSE}
  found, folder = play(sources | {"after": GOOD})
  by_name = {r.step: r for r in found.steps}
  statuses = [by_name[name].status for name in (*sources, "after")]
  assert statuses == ["done", "failed", "skipped", "failed", "done"]
  assert by_name["good"].complete and by_name["good"].result["value"] == 1
  assert by_name["raises"].result == {"value": "half"} and not by_name["raises"].complete
  assert by_name["raises"].why == "exit status 1: RuntimeError: a mistake of this step"
  assert "a mistake of this step" in by_name["raises"].tail
  assert by_name["skips"].why == "nothing to do here"
  assert "claim and result are accepted" in by_name["nonsense"].why
  # What is on disk is the same, and passes the checks of its readers.
  assert records.read_summary(folder / "summary.json") == found
  for one in found.steps:
    assert records.read_record(folder / f"{one.step}.json") == one


def test_a_step_that_hangs_is_ended_with_its_children_and_keeps_what_it_measured(play):
  found, _ = play({"hangs": HANGS, "after": GOOD}, limit=12.0)
  first, second = found.steps
  assert (first.status, first.result, first.complete) == ("timed_out", {"value": "before"}, False)
  assert "it was not done in 12 s" in first.why and 12 <= first.seconds < 20
  assert second.status == "done"
  assert not subprocess.run(["pgrep", "-f", "sleep 271.25"], capture_output=True).stdout


def test_a_step_that_a_library_kills_runs_again_without_the_peers(play):
  found, _ = play({"dies": DIES}, limit=60.0)
  assert found.steps[0].status == "done"
  assert found.steps[0].result["value"] == "without torch"
  assert "left out after signal 11" in found.steps[0].why


def test_steps_for_accelerators_are_skipped_on_a_cpu_and_late_ones_for_want_of_time(play):
  found, _ = play({"good": GOOD}, accelerator="it needs one")
  assert found.steps[0].status == "skipped"
  assert found.steps[0].why == "no accelerator here: it needs one"
  found, _ = play({"good": GOOD}, machine=GPU, budget=5.0)
  assert found.steps[0].status == "skipped" and "of the budget were left" in found.steps[0].why


def test_time_that_is_left_goes_to_later_steps_and_none_takes_theirs():
  two = [Step(name=n, module=n, limit=limit) for n, limit in (("a", 10.0), ("b", 30.0))]
  assert driver.allowed(two, 40.0) == 10.0
  assert driver.allowed(two, 60.0) == 30.0
  assert driver.allowed(two, 20.0) == 10.0  # its own in any case
  assert driver.allowed(two[1:], 12.0) == 12.0
  assert sum(step.limit for step in steps.STEPS) <= driver.BUDGET <= 480
  assert [s.name for s in steps.named(["models", "ceilings"])] == ["ceilings", "models"]
  with pytest.raises(ValueError, match="--steps: nothing; of ceilings, "):
    steps.named(["nothing"])


def test_partial_results_survive_a_kill_of_the_driver(tmp_path):
  command = [sys.executable, "-m", "benchmarks.device", "--out", str(tmp_path), "--small"]
  process = subprocess.Popen(
    [*command, "--steps", "ceilings,convolutions"], cwd=driver.ROOT, stdout=subprocess.DEVNULL
  )
  partial = tmp_path / "partial" / "ceilings.json"
  try:
    for _ in range(600):
      if records.read_partial(partial).get("result"):
        break
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
  finally:
    process.kill()
  assert records.read_partial(partial)["result"]["copy"]
  assert not list(tmp_path.rglob(".*.json.*"))  # no half-written file


def test_small_form_of_the_quick_steps(tmp_path):
  command = [sys.executable, "-m", "benchmarks.device", "--out", str(tmp_path), "--small"]
  names = ["ceilings", "hardware_tests", "products", "convolutions", "tiles", "models_tuned"]
  done = subprocess.run(
    [*command, "--steps", ",".join(names)], cwd=driver.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  found = records.read_summary(tmp_path / "summary.json")
  by_name = {r.step: r for r in found.steps}
  assert found.small and found.machine["platform"] == "cpu" and not found.measured
  for name in ("ceilings", "products", "convolutions"):
    assert by_name[name].status == "done" and by_name[name].complete, by_name[name]
  for name in ("hardware_tests", "tiles", "models_tuned"):
    assert by_name[name].status == "skipped" and "no accelerator here" in by_name[name].why
  assert by_name["ceilings"].result["ceilings"]["copy_gb_s"] > 0
  measured = by_name["products"].result
  assert set(measured["exact"].values()) == {True}
  for row in measured["rows"]:
    assert {f"mixed {p} %" for p in (0, 25, 50, 75, 100)} <= row["times"].keys()
    assert all(t["us"] > 0 and t["binds"] in ("memory", "compute") for t in row["times"].values())
  for row in by_name["convolutions"].result["rows"]:
    exact = [name for name, same in row["exact"].items() if same]
    assert {"plain int32", "plain patches", "exact patches"} <= {*exact}
  with pytest.raises(ValueError, match="in small form; runs of an accelerator"):
    report.take(tmp_path, tmp_path / "docs", tmp_path / "tiles")


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"status": "fine"}, "record.status: 'fine'; one of done, failed, timed_out, skipped"),
    ({"status": "failed"}, "record.why: empty"),
    ({"result": None}, "record.result: None"),
    ({"seconds": "1"}, "record.seconds: '1'; <class 'float'> is accepted"),
    ({"complete": 1}, "record.complete: 1"),
    ({"result": {"claims": ["x"]}}, "record.result.claims: 'x'"),
  ],
)
def test_records_are_checked(changes, match):
  with pytest.raises(ValueError, match=match):
    record(**changes)


def test_files_of_other_versions_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"summary\.version: 2; 1 is accepted"):
    summary(version=2)
  with pytest.raises(ValueError, match=r"summary\.machine\.platform: None"):
    summary(machine={"device_kind": "x"})
  (tmp_path / "summary.json").write_text('{"version": 1}')
  with pytest.raises(ValueError, match=r"summary.json: not what `make device` writes"):
    records.read_summary(tmp_path / "summary.json")


def test_what_json_has_no_word_for_does_not_cost_a_step_its_results(tmp_path):
  values = {"a": [float("nan"), np.float32(np.inf), 1.5], "b": np.int32(3), "c": jax.numpy.ones(())}
  records.write(tmp_path / "x.json", values)
  found = json.loads((tmp_path / "x.json").read_text())
  assert found == {"a": ["nan", "inf", 1.5], "b": 3, "c": 1.0}
  with pytest.raises(TypeError, match="object: no value that JSON can hold"):
    records.write(tmp_path / "x.json", {"a": object()})


def test_the_page_is_what_the_committed_results_say():
  page = (driver.ROOT / "docs" / "hardware.md").read_text()
  assert page == report.render(report.documents())
  if not report.documents():
    assert "No device has been measured yet." in page


def test_results_are_taken_step_by_step_into_the_page(tmp_path):
  run, docs, folder = tmp_path / "run", tmp_path / "docs", tmp_path / "tiles"
  claims = lambda text: {"claims": [{"claim": "speed | of it", "result": text}]}
  first = [record(step="a", result=claims("one"), tail="/home/somebody"), record(step="b")]
  failed = record(step="c", status="failed", why="no luck", complete=False, result=None)
  records.write(run / "summary.json", summary(steps=[*first, failed]))
  kind = GPU["device_kind"]
  shape = tile_files.Shape(m=8, k=64, n=64, block=64)
  tuned = tile_files.Tuned(
    tiles=tile_files.gpu_tiles.Tiles(m=64, n=128), seconds=1.0, heuristic_seconds=None
  )
  measured = tile_files.file_of(run / "tiles", kind)
  measured.parent.mkdir()
  measured.write_text(tile_files.encode(kind, {shape: tuned}))
  report.take(run, docs, folder)
  assert tile_files.read(folder, kind) == {shape: tuned.tiles}
  (document,) = report.documents(docs / "hardware")
  assert "/home/somebody" not in json.dumps(document)
  page = report.render([document])
  assert f"## {kind}" in page and "No device" not in page
  row = "| speed / of it | `python -m benchmarks.device --steps a` | one | 2026-01-02, 0123 |"
  assert row in page.splitlines()
  assert "| step c | `python -m benchmarks.device --steps c` | failed: no luck |" in page
  # Again: what measured something replaces its step, what did not leaves it.
  later = [
    record(step="a", status="failed", why="x", result=None),
    record(step="c", result=claims("3")),
  ]
  records.write(run / "summary.json", summary(steps=later, date="2026-01-03"))
  report.take(run, docs, folder)
  page = report.render(report.documents(docs / "hardware"))
  assert row in page.splitlines()
  assert "| 3 | 2026-01-03, 0123 |" in page and "no luck" not in page
  with pytest.raises(ValueError, match="this is the document of"):
    report.merged(document, summary(machine={**GPU, "device_kind": "another"}))


def test_profiles_are_checked_and_read_between_what_was_measured(tmp_path):
  row = lambda batch, ratio, us: {
    **{"batch": batch, "ratio": ratio, "p50_us": us, "p99_us": 2 * us, "calls": 9},
    **{"device_p50_us": us, "device_p99_us": us},
  }
  grid = [row(1, 0.0, 100.0), row(1, 1.0, 60.0), row(9, 0.0, 500.0), row(9, 1.0, 300.0)]
  facts = {"version": 1, "device": "d", "platform": "gpu", "made": "measured", "date": "2026-01-02"}
  facts |= {"how": "so", "versions": {}, "tiles": "by rule", "models": {"m": {"latency": grid}}}
  path = tmp_path / "profile.json"
  records.write(path, facts)
  profile = profiles.read(path)
  assert profile.latency("m", batch=1, ratio=0.5) == pytest.approx(80e-6)
  assert profile.latency("m", batch=5, ratio=1.0, field="p99_us") == pytest.approx(360e-6)
  with pytest.raises(ValueError, match=r"batch: 10; 1..9 was measured"):
    profile.latency("m", batch=10, ratio=0.5)
  with pytest.raises(ValueError, match="model: 'x'; one of m is accepted"):
    profile.latency("x", batch=1, ratio=0.5)
  holed = profiles.Profile(**facts | {"models": {"m": {"latency": grid[:3]}}})
  with pytest.raises(ValueError, match=r"\(9, 1.0\) was not measured"):
    holed.latency("m", batch=1, ratio=0.5)
  records.write(path, facts | {"made": "estimated"})
  with pytest.raises(ValueError, match=r"profile\.made: 'estimated'; 'measured' is accepted"):
    profiles.read(path)
  records.write(path, facts | {"models": {"m": {"latency": [row(1, 0.0, -1.0)]}}})
  with pytest.raises(ValueError, match=r"models\.m\.latency\.p50_us: -1\.0; a number from 0 on"):
    profiles.read(path)


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


def test_nothing_of_the_driver_needs_more_than_the_standard_library():
  code = "import sys, benchmarks.device.__main__; print([m for m in ('jax', 'numpy', 'flexiq_jax') "
  code += "if m in sys.modules])"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=driver.ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


def test_a_step_on_another_device_than_the_drivers_says_so(tmp_path):
  context = Context(step="a", folder=tmp_path, seconds=1.0)
  assert present.device(context) == jax.devices()[0]
  records.write(tmp_path / "partial" / "machine.json", {"result": GPU})
  with pytest.raises(RuntimeError, match="JAX runs on cpu here; the driver found a gpu"):
    present.device(context)


def test_environment_of_steps(tmp_path, monkeypatch):
  monkeypatch.setattr(driver, "ROOT", tmp_path)
  monkeypatch.setenv("PYTHONPATH", "before")
  wheel = tmp_path / "build" / "wheels" / "a-1-py3-none-any.whl"
  wheel.parent.mkdir(parents=True)
  wheel.touch()
  env = driver.environment(pathlib.Path("out"), "gpu")
  assert env["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "before", str(wheel)])
  assert env["JAX_PLATFORMS"] == "cuda,cpu" and env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
  assert driver.environment(pathlib.Path("out"), "tpu")["JAX_PLATFORMS"] == "tpu,cpu"
