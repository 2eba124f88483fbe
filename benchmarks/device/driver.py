"""Runs the steps, each in a process of its own with a limit of its own, and records how they end.

The driver imports nothing but the standard library and knows the device only from a process that
it asked (`machine.py`): whatever is broken on a machine, it goes on and writes.
"""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.device import records
from benchmarks.device.records import Record, Summary
from benchmarks.device.steps import Step

ROOT = pathlib.Path(__file__).parents[2]
BUDGET = 475.0  # seconds of all steps on an accelerator
TAIL = 4000  # characters of a step's output that its record keeps
_GRACE = 2.0  # seconds between being asked to end and being killed
_MARGIN = 4.0  # of a limit that a step leaves to its own end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What is to be run.

  Attributes:
    steps: in order.
    folder: of the results.
    python: interpreter of the steps.
    small: sizes of a trial.
    budget: seconds of all steps on an accelerator; 0 sets no limit but their own.
    command: that made this, for the record.
  """

  steps: Sequence[Step]
  folder: pathlib.Path
  python: str = sys.executable
  small: bool = False
  budget: float = BUDGET
  command: str = "make device"


def run(job: Job, say: Callable[[str], None] = print) -> Summary:
  """Runs a job; every failure of a step is in the summary and in no exception."""
  began = time.monotonic()
  (job.folder / "partial").mkdir(parents=True, exist_ok=True)
  for step in job.steps:  # of an earlier run
    for old in (job.folder / f"{step.name}.json", _partial(job, step)):
      old.unlink(missing_ok=True)
  machine = describe(job)
  small = job.small or machine["platform"] == "cpu"
  if "error" in machine:
    say(f"the device could not be asked: {machine['error']}")
  say(f"device: {machine['device_kind']} ({machine['platform']}){', small' * small}")
  done: list[Record] = []
  summary = _summary(job, machine, small, done, began)
  with _beside(job, machine, small):
    for i, step in enumerate(job.steps):
      seconds = job.budget - (time.monotonic() - began)
      timed = job.budget and not small
      limit = allowed(job.steps[i:], seconds) if timed else _limit(step, small)
      record = run_step(job, step, machine, small, limit)
      done.append(record)
      records.write(job.folder / f"{step.name}.json", record)
      summary = _summary(job, machine, small, done, began)
      records.write(job.folder / "summary.json", summary)
      why = f": {record.why}" if record.why else "" if record.complete else ", in part"
      say(f"{step.name}: {record.status} in {record.seconds:.0f} s{why}")
      for one in (record.result or {}).get("claims", []):
        say(f"  {one['claim']}: {one['result']}")
  counts = {s: sum(r.status == s for r in done) for s in records.STATUSES}
  told = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.items() if n)
  say(f"{len(done)} steps in {summary.seconds:.0f} s: {told}; {job.folder / 'summary.json'}")
  return summary


def allowed(steps: Sequence[Step], left: float) -> float:
  """Seconds of the first of `steps`: its limit, and what the others do not need of what is left."""
  own, others = steps[0].limit, sum(step.limit for step in steps[1:])
  return max(0.0, min(left, max(own, left - others)))


def run_step(job: Job, step: Step, machine: dict, small: bool, limit: float) -> Record:
  """Runs one step and tells how it ended."""
  if step.accelerator and machine["platform"] == "cpu":
    return _record(step, "skipped", f"no accelerator here: {step.accelerator}", 0.0, limit)
  if limit < 2 * _MARGIN:
    return _record(step, "skipped", f"{limit:.0f} s of the budget were left", 0.0, limit)
  command = [job.python, "-m", "benchmarks.device.worker", step.module, "--step", step.name]
  command += ["--folder", str(job.folder.resolve()), "--seconds", f"{limit - _MARGIN:.1f}"]
  command += ["--small"] * small
  command += ["--options", *step.options] if step.options else []
  log = job.folder / f"{step.name}.log"
  env = environment(job.folder, machine["platform"])
  started = time.monotonic()
  status, why = call(command, env, log, limit)
  left = limit - (time.monotonic() - started)
  if why.startswith("signal") and left > 20 and "FLEXIQ_DEVICE_TORCH" not in env:
    # A library may take the process down where two of them meet: once more without the peers.
    first = why
    command[command.index("--seconds") + 1] = f"{left - _MARGIN:.1f}"
    status, why = call(command, env | {"FLEXIQ_DEVICE_TORCH": "0"}, log, left)
    why = why or f"peers of torch left out after {first}" * (status == "done")
  seconds = time.monotonic() - started
  partial = records.read_partial(_partial(job, step))
  result = partial.get("result")
  if status == "done" and partial.get("skipped"):
    status, why = "skipped", partial["skipped"]
  elif status == "done" and result is None:
    status, why = "failed", "it ended without a result"
  try:
    complete = status == "done" and bool(partial.get("complete"))
    return _record(step, status, why, seconds, limit, tail(log), complete, result)
  except ValueError as error:  # a step that writes nonsense is a failed step
    return _record(step, "failed", str(error), seconds, limit, tail(log))


def call(command: Sequence[str], env: dict[str, str], log: pathlib.Path, limit: float):
  """Runs a process group to its end or its limit.

  Returns:
    `done`, `failed` or `timed_out`, and why.
  """
  with log.open("w") as output:
    process = start(command, env, output)
    try:
      code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
      return "timed_out", f"it was not done in {limit:.0f} s"
    finally:
      end(process)  # also when the driver itself is interrupted, and what the step left running
  if code < 0:
    return "failed", f"signal {-code} ended it"
  if code == 0:
    return "done", ""
  last = (tail(log).strip().splitlines() or ["it printed nothing"])[-1]
  return "failed", f"exit status {code}: {last[:200]}"


def start(command: Sequence[str], env: dict[str, str], output: Any) -> subprocess.Popen:
  """Starts a process group in the root of the repository."""
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=env,
    stdin=subprocess.DEVNULL,
    stdout=output,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )


def end(process: subprocess.Popen) -> None:
  """Ends a process group: asks first, then kills."""
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGTERM)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(timeout=_GRACE)
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def environment(folder: pathlib.Path, platform: str | None) -> dict[str, str]:
  """Environment of a step: our code and carried wheels, and which backends JAX may take."""
  env = dict(os.environ)
  wheels = sorted(str(p) for p in (ROOT / "build" / "wheels").glob("*.whl"))
  paths = [str(ROOT), *([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []), *wheels]
  env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
  # Several libraries share the memory, and peaks are to be those of what ran.
  env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  env.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if platform == "gpu":
    env["JAX_PLATFORMS"] = "cuda,cpu"
  elif platform is not None:
    env["JAX_PLATFORMS"] = "cpu" if platform == "cpu" else f"{platform},cpu"
  return env


def describe(job: Job) -> dict[str, Any]:
  """The machine, as a process of its own sees it; a CPU if that process fails."""
  partial = job.folder / "partial" / "machine.json"
  partial.unlink(missing_ok=True)
  command = [job.python, "-m", "benchmarks.device.worker", "machine", "--step", "machine"]
  command += ["--folder", str(job.folder.resolve()), "--seconds", "60"]
  log = job.folder / "machine.log"
  _, why = call(command, environment(job.folder, None), log, 60)
  found = records.read_partial(partial).get("result")
  if found is None:
    return {"platform": "cpu", "device_kind": "unknown", "error": f"{why}\n{tail(log)}"}
  return found


@contextlib.contextmanager
def _beside(job: Job, machine: dict[str, Any], small: bool):
  """Prepares the models on the CPU while other steps have the accelerator."""
  wanted = any(step.module == "whole_models" for step in job.steps)
  if not wanted or small:
    yield
    return
  command = [job.python, "-m", "benchmarks.device.worker", "prepare", "--step", "prepare"]
  command += ["--folder", str(job.folder.resolve()), "--seconds", "400"]
  command += ["--options", machine["platform"], machine["device_kind"]]
  with (job.folder / "prepare.log").open("w") as output:
    process = start(command, environment(job.folder, "cpu"), output)
    try:
      yield
    finally:
      end(process)


def tail(log: pathlib.Path) -> str:
  """The end of a step's output."""
  try:
    return log.read_text(errors="replace")[-TAIL:]
  except OSError:
    return ""


def _limit(step: Step, small: bool) -> float:
  return step.small_limit if small else step.limit


def _partial(job: Job, step: Step) -> pathlib.Path:
  return job.folder / "partial" / f"{step.name}.json"


def _record(step, status, why, seconds, limit, tail="", complete=False, result=None) -> Record:
  return Record(
    step=step.name,
    status=status,
    why=why,
    seconds=seconds,
    limit=limit,
    complete=complete,
    result=result,
    tail=tail,
  )


def _summary(job: Job, machine, small: bool, done: list[Record], began: float) -> Summary:
  return Summary(
    version=records.VERSION,
    made="measured",
    date=datetime.date.today().isoformat(),
    command=job.command,
    small=small,
    machine=machine,
    seconds=time.monotonic() - began,
    steps=list(done),
  )
