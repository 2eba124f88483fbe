"""A sweep on a real SLURM: an array of six runs, one killed, one requeued, one out of time.

`make slurm-test` runs it and keeps what was printed. Skipped where SLURM is not installed.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.runs.sweeps import cluster_for_test as clusters

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = "--config=configs/sweep_digits.py:runlocal"
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(clusters.missing()), reason=f"SLURM: {clusters.missing()}"),
]


def command(workdir, *flags):
  return [sys.executable, "run.py", CONFIG, f"--workdir={workdir}", *flags]


def tell(text: str) -> None:
  print(text, flush=True)


def wait_for(what, seconds: float = 240.0):
  """The first true value of a function, within that time."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if found := what():
      return found
    time.sleep(0.2)
  raise AssertionError(f"{what.__name__} did not happen within {seconds:g} s")


def runs(folder: pathlib.Path) -> dict[str, int]:
  """Cell -> process of its run, of those that have begun to write."""
  said = subprocess.run(
    ["pgrep", "--full", "--list-full", f"run.py.*--workdir={folder}/"],
    capture_output=True,
    text=True,
  ).stdout
  found = {}
  for line in said.splitlines():
    name = re.search(rf"--workdir={folder}/(\S+)", line)
    begun = name and "launch.py" not in line and (folder / name[1] / "metrics.jsonl").exists()
    if name and begun:
      found[name[1]] = int(line.split()[0])
  return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  folder = tmp_path_factory.mktemp("slurm")
  with clusters.cluster(folder) as environment:
    cache = {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    yield environment | cache


@pytest.mark.timeout(1500)
def test_array_with_jobs_killed_requeued_and_past_their_time_limit(tmp_path, slurm):
  there, local = tmp_path / "slurm", tmp_path / "local"
  ask = lambda *words: subprocess.run(words, env=slurm, capture_output=True, text=True).stdout
  flags = ("--config.executor=slurm", "--config.slurm.minutes=30", "--config.slurm.notice=45")
  sweep = subprocess.Popen(
    command(there, *flags), cwd=ROOT, env=slurm, stdout=subprocess.PIPE, text=True
  )
  try:
    limited, process = next(iter(wait_for(lambda: runs(there)).items()))
    os.kill(process, signal.SIGSTOP)  # so that it gets nowhere until its time is up
    job = (there / limited / ".cell.job").read_text().strip()
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    tell(f"{limited}: job {job} suspended, its time limit is now a minute")
    other = wait_for(lambda: [*(runs(there).keys() - {limited})])[0]
    killed = (there / other / ".cell.job").read_text().strip()
    ask("scancel", killed)
    tell(f"{other}: job {killed} cancelled\n{ask('squeue', '--array')}")
    third = wait_for(lambda: [*(runs(there).keys() - {limited, other})])[0]
    preempted = (there / third / ".cell.job").read_text().strip()
    ask("scontrol", "requeue", preempted)  # as the scheduler does when it preempts a job
    tell(f"{third}: job {preempted} requeued while it runs")
    wait_for(lambda: "PENDING" in ask("squeue", "--array", "--format=%i %T", "--jobs", preempted))
    assert "Restarts=1" in ask("scontrol", "show", "job", preempted)
    ask("scontrol", "update", f"JobId={preempted}", "StartTime=now")
    requeued = lambda: re.search(r"Requeued job .*", text_of(there / ".jobs", job))
    tell(f"{limited}: {wait_for(requeued, 300)[0]}")
    wait_for(lambda: "PENDING" in ask("squeue", "--array", "--format=%i %T", "--jobs", job))
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=30", "StartTime=now")
    said, _ = sweep.communicate(timeout=900)
  finally:
    sweep.kill()
  tell(said)
  assert sweep.returncode == 0, said
  assert re.search(r"submitted 6 cells as job \d+\n", said)
  assert f"{other}: stopped" in said and f"{limited}: finished" in said
  for name in (limited, third):
    assert (there / name / "log.txt").read_text().count("=== ") >= 2
  assert f"{third}: finished" in said
  assert "interrupted; run the same command to resume" in (there / limited / "log.txt").read_text()
  again = subprocess.run(
    command(there, *flags), cwd=ROOT, env=slurm, capture_output=True, text=True
  )
  tell(again.stdout)
  assert again.returncode == 0, again.stderr
  assert re.search(r"submitted 1 cell as job \d+\n", again.stdout)
  subprocess.run(
    command(local, "--config.local.processes=2"),
    cwd=ROOT,
    env=slurm,
    check=True,
    capture_output=True,
  )
  table = (there / "results.csv").read_text()
  assert table == (local / "results.csv").read_text()
  assert table.count(",finished,") == len(table.splitlines()) - 1 > 6
  assert ask("squeue", "--noheader") == ""
  tell((there / "report.md").read_text())


@pytest.mark.timeout(600)
def test_a_cell_of_two_processes(tmp_path, slurm):
  """Two tasks of one job find each other, and the rows are those of one process."""
  only = "--config.only=size4-seed0"
  two = ("--config.sweep.bases.digits.tasks=2", "--config.slurm.minutes=30")
  done = subprocess.run(
    command(tmp_path / "two", only, "--config.executor=slurm", *two),
    **{"cwd": ROOT, "env": slurm, "capture_output": True, "text": True},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  cell = tmp_path / "two" / "digits-group_size4-seed0"
  start = (cell / "metrics.jsonl").read_text().splitlines()[0]
  assert '"process_count": 2' in start
  assert (cell / "log.1.txt").is_file()
  one = ("--config=configs/sweep_digits.py:runlocal", f"--workdir={tmp_path / 'one'}", only)
  subprocess.run([sys.executable, "run.py", *one], cwd=ROOT, check=True, capture_output=True)
  rows = (tmp_path / "one" / cell.name / "results.csv").read_text()
  assert (cell / "results.csv").read_text() == rows
  tell(f"two tasks: {start}\n{rows}")


def text_of(folder: pathlib.Path, job: str) -> str:
  """What the job's own log says."""
  return "".join(path.read_text() for path in folder.rglob(f"{job}_*log.*"))
