"""How steps end, what is written, and that the small form of the quick steps runs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from benchmarks.device import __main__ as command_line
from benchmarks.device import driver, present, records, report, steps
from benchmarks.device.context import Context
from benchmarks.device.driver import Job
from benchmarks.device.steps import Step
from tests.benchmarks.device.records_for_test import CPU, GPU


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
    monkeypatch.setattr(driver, "describe", lambda job: machine)
    limits = {"limit": limit, "small_limit": limit}
    job = Job(
      steps=[Step(name=n, module=n, **limits, **facts) for n in sources],
      folder=tmp_path / "out",
      budget=budget,
    )
    return driver.run(job, say=lambda line: None), tmp_path / "out"

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


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["--steps", "ceilings,foo"], "--steps: foo; of ceilings, "),
    (["--budget", "-1"], "--budget: -1.0; 0 or more is accepted"),
    (["--budget", "nan"], "--budget: nan; 0 or more is accepted"),
    (["--out", "file/device"], "--out: file/device: Not a directory; a folder that can be made"),
  ],
)
def test_bad_arguments_are_told_before_anything_runs(
  arguments, told, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("file").touch()
  with pytest.raises(SystemExit) as ended:
    command_line.parse(arguments)
  assert ended.value.code == 2
  assert told in capsys.readouterr().err
