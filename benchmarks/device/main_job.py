"""The main job on the device against the same on the CPU: train, calibrate, search, evaluate.

| run | where | what |
|---|---|---|
| `cpu` | CPU | the digits whole, from training on |
| `device` | device | the same, training included |
| `device_from_cpu` | device | after the CPU's trained weights: what is compared |
| `real_cpu`, `real_device` | both | ResNet-20 on CIFAR-10, with its files |

Those files are looked for in $FLEXIQ_DATA and build/data.

Trained weights differ between backends, as training amplifies roundings; from the same weights on,
recipes and accuracies should be equal and fitness within 1e-5. Fitness of one recipe's model is
computed on both (`main_job_fitness.py`). All processes run side by side, so their seconds are those
of a busy machine.
"""

import csv
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from benchmarks.device.context import Context, Skipped, claim

ROOT = pathlib.Path(__file__).parents[2]
REAL = ("cifar10_resnets/cifar10_resnet20.safetensors", "cifar10/labels.npz")
REAL_FLAGS = (
  "--config.data.limit=1000",
  "--config.calibration.images=128",
  "--config.random_seeds=(0,)",
  "--config.variants=()",
)
TOLERANCE = 1e-5


def run(context: Context) -> dict[str, Any]:
  """Starts the runs, compares what they wrote as they end."""
  if importlib.util.find_spec("ml_collections") is None:
    raise Skipped("ml-collections is not installed; `make device-wheels` where there is a network")
  # Asked of the driver's record: this process leaves the device to those that it starts.
  platform = context.earlier("machine").get("platform", "cpu")
  jobs = Jobs(context, platform)
  digits = "digits.py:runlocal" if context.small else "digits.py:easy"
  jobs.start("cpu", digits, "cpu")
  alone = platform == "tpu"  # which one process has at a time
  if platform == "gpu":
    jobs.start("device", digits, platform)
  real = real_data()
  if real and not context.small and not alone and (os.cpu_count() or 1) >= 8:
    for name, where in (("real_cpu", "cpu"), ("real_device", platform)):
      jobs.start(name, "resnet20_cifar10.py", where, REAL_FLAGS, {"FLEXIQ_DATA": str(real)})
  began = False
  while context.left() > 1:
    if not began and jobs.trained("cpu"):
      began = True
      jobs.start("device_from_cpu", digits, platform, train_of="cpu")
    found = jobs.done("cpu") and jobs.exit("cpu") == 0
    if found and "fitness_cpu" not in jobs:
      jobs.fitness("fitness_cpu", digits, "cpu")
    if found and "fitness_device" not in jobs and not (alone and not jobs.all_done()):
      jobs.fitness("fitness_device", digits, platform)
      continue
    if alone and "fitness_device" in jobs and "device" not in jobs and jobs.all_done():
      jobs.start("device", digits, platform)
      continue
    context.save(finished(jobs, platform))
    if jobs.all_done() and (began or jobs.done("cpu")):
      break
    time.sleep(1.0)
  complete = jobs.all_done()
  jobs.end()
  return finished(jobs, platform) | {"complete": complete}


def real_data() -> pathlib.Path | None:
  """Folder of pretrained weights and images; None where they are not there."""
  for folder in (os.environ.get("FLEXIQ_DATA"), str(ROOT / "build" / "data")):
    if folder and all((pathlib.Path(folder) / name).is_file() for name in REAL):
      return pathlib.Path(folder)
  return None


class Jobs:
  """Processes of this step, each with a workdir and a log."""

  def __init__(self, context: Context, platform: str):
    """Starts with an empty folder."""
    self.folder = context.folder / "main_job"
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir(parents=True)
    self._platform = platform
    self._running: dict[str, tuple[subprocess.Popen, float]] = {}
    self.seconds: dict[str, float] = {}

  def __contains__(self, name: str) -> bool:
    return name in self._running

  def start(
    self, name: str, config: str, where: str, flags=(), env=None, train_of: str = ""
  ) -> None:
    """Runs a config; with `train_of` after the training of another run."""
    workdir = self.folder / name
    if train_of:
      workdir.mkdir()
      shutil.copytree(self.folder / train_of / "train", workdir / "train")
    command = ["run.py", f"--config=configs/{config}", f"--workdir={workdir}", *flags]
    self._start(name, command, where, env)

  def fitness(self, name: str, config: str, where: str) -> None:
    """Computes the fitness of the CPU's recipe."""
    module, _, argument = config.removesuffix(".py").partition(".py:")
    command = ["-m", "benchmarks.device.main_job_fitness", "--config", module]
    command += ["--argument", argument, "--workdir", str(self.folder / "cpu")]
    command += ["--json", str(self.folder / f"{name}.json")]
    self._start(name, command, where, None)

  def _start(self, name: str, command: list[str], where: str, env: dict | None) -> None:
    platforms = {"cpu": "cpu", "gpu": "cuda,cpu"}.get(where, f"{where},cpu")
    with (self.folder / f"{name}.log").open("w") as log:
      process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms} | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    self._running[name] = (process, time.monotonic())

  def exit(self, name: str) -> int | None:
    """Exit status; None while it runs."""
    return self._running[name][0].poll()

  def done(self, name: str) -> bool:
    """Whether it has ended; its seconds are noted when this is first seen."""
    ended = self.exit(name) is not None
    if ended and name not in self.seconds:
      self.seconds[name] = time.monotonic() - self._running[name][1]
    return ended

  def all_done(self) -> bool:
    """Whether all have ended."""
    return all([self.done(name) for name in self._running])

  def trained(self, name: str) -> bool:
    """Whether a run is behind its training: what comes next has left something."""
    return (self.folder / name / "calibration").is_dir()

  def end(self) -> None:
    """Ends what still runs."""
    for process, _ in self._running.values():
      if process.poll() is None:
        process.terminate()

  def states(self) -> dict[str, dict[str, Any]]:
    """Exit status, seconds and, of those that failed, the last lines of each."""
    found: dict[str, dict[str, Any]] = {}
    for name in self._running:
      code = self.exit(name)
      found[name] = {"exit": code, "seconds": self.seconds.get(name)}
      if code:
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        found[name]["tail"] = text[-2500:]
    return found


def finished(jobs: Jobs, platform: str) -> dict[str, Any]:
  """What can be compared so far, and the claims."""
  states = jobs.states()
  ended = lambda *names: all(states.get(name, {}).get("exit") == 0 for name in names)
  result: dict[str, Any] = {"platform": platform, "jobs": states, "compared": {}}
  claims = []
  for what, first, second in (
    ("digits", "cpu", "device_from_cpu"),
    ("ResNet-20 on CIFAR-10", "real_cpu", "real_device"),
  ):
    if ended(first, second):
      found = compare(jobs.folder / first, jobs.folder / second)
      result["compared"][what] = found
      same = "equal" if found["recipe_equal"] else f"{found['order_differs']} groups elsewhere"
      claims.append(claim(f"{what}: recipe against the CPU's, same weights", same))
      told = f"{found['top1_differs']:.2f} points at most, {found['rows']} rows"
      claims.append(claim(f"{what}: top-1 against the CPU's", told))
  if ended("device"):
    rows = read_rows(jobs.folder / "device")
    result["device_rows"] = rows
    claims.append(claim("digits whole on the device, training included", f"{len(rows)} rows"))
  if ended("fitness_cpu", "fitness_device"):
    values = [
      json.loads((jobs.folder / f"fitness_{name}.json").read_text())["fitness"]
      for name in ("cpu", "device")
    ]
    relative = max(abs(b - a) / max(abs(a), 1e-30) for a, b in zip(*values, strict=True))
    result["fitness"] = {"cpu": values[0], "device": values[1], "relative": relative}
    told = f"{relative:.1e} relative at most, of {len(values[0])} masks"
    told += "" if relative <= TOLERANCE else f"; {TOLERANCE:.0e} is wanted"
    claims.append(claim("digits: fitness against the CPU's, same recipe", told))
  failed = [name for name, state in states.items() if state["exit"]]
  if failed:
    claims.append(claim("main job: runs that failed", ", ".join(failed)))
  return result | {"claims": claims}


def compare(first: pathlib.Path, second: pathlib.Path) -> dict[str, Any]:
  """Recipes and rows of two workdirs."""
  recipes = [json.loads((folder / "recipe.json").read_text()) for folder in (first, second)]
  rows = [{(r["method"], r["ratio"], r["seed"]): r for r in read_rows(f)} for f in (first, second)]
  both = rows[0].keys() & rows[1].keys()
  scales = [{layer["name"]: layer["x_scale"] for layer in r["layers"]} for r in recipes]
  orders = [r["order"] for r in recipes]
  return {
    "recipe_equal": recipes[0] == recipes[1],
    "order_differs": sum(a != b for a, b in zip(*orders, strict=False)),
    "x_scale_differs": max(
      abs(scales[1].get(name, 0.0) - scale) / scale for name, scale in scales[0].items()
    ),
    "top1_differs": max(
      (abs(float(rows[0][key]["top1"]) - float(rows[1][key]["top1"])) for key in both), default=0.0
    ),
    "rows": len(both),
    "rows_missing": len(rows[0].keys() ^ rows[1].keys()),
  }


def read_rows(folder: pathlib.Path) -> list[dict[str, str]]:
  """The rows of a run's results."""
  with (folder / "results.csv").open() as file:
    return list(csv.DictReader(file))
