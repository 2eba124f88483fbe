"""Cells on this machine: locks, failures, kills, interruption, memory, an idle parent."""

import contextlib
import io
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from flexiq_jax.runs import interruption
from flexiq_jax.runs.sweeps import collect, executors, locks, states, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.executors import local
from flexiq_jax.runs.sweeps.states import Status
from flexiq_jax.runs.workdir import Workdir
from tests.runs.sweeps import stubs_for_test as stubs

STUB = pathlib.Path(stubs.__file__)


def sweep(cells, **settings):
  out = io.StringIO()
  with Board(cells, stream=out) as board:
    board.interval = 0.1
    local.run(cells, local.Settings(**settings), board)
  return out.getvalue()


def statuses(cells):
  return [states.state(cell).status for cell in cells]


def test_cells_run_and_what_is_shown(tmp_path):
  cells = [stubs.cell(tmp_path, seed) for seed in range(3)]
  assert statuses(cells) == [Status.WAITING] * 3
  out = sweep(cells, processes=2)
  assert statuses(cells) == [Status.FINISHED] * 3
  assert len(re.findall(r"stub-seed\d: finished\n", out)) == 3
  rows = collect.collect(cells)
  assert [row["top1"] for row in rows if row["seed"] == 1] == [91.0, 92.0, 93.0, 94.0]
  assert {row["device"] for row in rows} == {"stub"}
  # A second sweep starts nothing.
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  assert sweep(cells) == ""
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_a_failed_cell_stops_no_other_and_is_shown_with_its_message(tmp_path):
  cells = [stubs.cell(tmp_path, 0, "fail"), stubs.cell(tmp_path, 1)]
  out = sweep(cells)
  message = "error: config.seed: the stub fails as it was told"
  assert f"stub-seed0: failed: {message}\n" in out
  assert statuses(cells) == [Status.FAILED, Status.FINISHED]
  assert "the stub fails\nas it was told" in cells[0].log.read_text()
  (row,) = [row for row in collect.collect(cells) if row["cell"] == "stub-seed0"]
  assert (row["status"], row["reason"], "top1" in row) == ("failed", message, False)
  # Once more, with what made it fail repaired: the rows that are there are kept.
  sweep([stubs.cell(tmp_path, 0)])
  assert statuses(cells) == [Status.FINISHED] * 2


def test_a_command_that_is_not_there_fails_its_cell(tmp_path):
  cell = stubs.cell(tmp_path, 0, command=("/no/such/program",))
  sweep([cell])
  assert states.state(cell).status == Status.FAILED
  assert "/no/such/program" in cell.log.read_text()


def test_a_cell_is_run_by_one_sweep(tmp_path):
  cells = [stubs.cell(tmp_path, seed) for seed in range(4)]
  both = [threading.Thread(target=sweep, args=(cells,)) for _ in range(2)]
  for thread in both:
    thread.start()
  for thread in both:
    thread.join()
  assert sorted((tmp_path / "finishes").read_text().split()) == ["0", "1", "2", "3"]
  assert all("=== " in c.log.read_text() for c in cells)
  assert all(c.log.read_text().count("=== ") == 1 for c in cells)


def test_a_lock_names_its_owner_and_frees_itself(tmp_path):
  assert locks.owner(tmp_path) is None
  lock = locks.take(tmp_path)
  assert lock is not None and locks.take(tmp_path) is None
  found = locks.owner(tmp_path)
  assert found is not None and found.startswith(f"process {os.getpid()} on ")
  lock.release()
  assert locks.owner(tmp_path) is None
  # As a process that was killed leaves it: the system's lock is gone, the owner's name still there.
  lock = locks.take(tmp_path)
  os.close(lock.descriptor)
  assert locks.owner(tmp_path) is None and lock.path.read_text()
  # One of another host counts by its age, where that host's lock cannot be seen.
  lock.path.write_text('{"host": "elsewhere", "process": 7, "since": "noon"}')
  assert locks.owner(tmp_path) == "process 7 on elsewhere, since noon"
  assert locks.take(tmp_path) is None
  old = time.time() - locks.STALE - 1
  os.utime(lock.path, (old, old))
  assert locks.owner(tmp_path) is None
  again = locks.take(tmp_path)
  assert again is not None
  again.release()


def test_a_run_that_was_started_by_hand_is_left_alone(tmp_path):
  cell = stubs.cell(tmp_path, 0)
  run = Workdir(cell.workdir)
  with run.held():
    found = states.state(cell)
    assert found.status == Status.RUNNING
    assert found.message.startswith(f"process {os.getpid()} on ")
    assert locks.take(cell.workdir) is None
  assert states.state(cell).status == Status.WAITING
  sweep([cell])
  assert cell.finished


def wait_until(what, seconds: float = 60.0) -> None:
  deadline = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_run_keeps_the_lock_of_a_sweep_that_is_gone(tmp_path):
  cell = stubs.cell(tmp_path, 0, "slow")
  lock = locks.take(cell.workdir)
  attempt = work.start(cell, lock)
  os.close(lock.descriptor)  # what the system does where the sweep is killed
  wait_until(lambda: (cell.workdir / "metrics.jsonl").exists())
  assert locks.owner(cell.workdir) is not None and locks.take(cell.workdir) is None
  attempt.stop()
  assert attempt.process.wait() == interruption.INTERRUPTED
  assert locks.owner(cell.workdir) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such signal")
def test_runs_end_in_order_where_their_sweep_is_killed(tmp_path):
  command = [sys.executable, str(STUB), "sweep", str(tmp_path), "1", "slow"]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  cell = stubs.cell(tmp_path, 0)
  wait_until(lambda: (cell.workdir / "metrics.jsonl").exists())
  process.kill()
  process.wait()
  wait_until(lambda: locks.owner(cell.workdir) is None)
  assert "interrupted; run the same command to resume" in cell.log.read_text()
  found = states.state(cell)
  assert (found.status, found.message) == (Status.STOPPED, "killed before it could say why")


def killed_at_random(folder: pathlib.Path, count: int, draw: random.Random) -> None:
  """Runs a sweep to its end through `count` kills of itself or of one of its cells."""
  for kill in range(count):
    process = subprocess.Popen(
      [sys.executable, str(STUB), "sweep", str(folder), "3"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    time.sleep(draw.uniform(0.25, 1.1))
    runs = subprocess.run(
      ["pgrep", "--parent", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    if kill % 2 and runs:
      with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(int(draw.choice(runs)), signal.SIGKILL)
      process.wait()
    else:
      process.kill()
      process.wait()
  done = subprocess.run(
    [sys.executable, str(STUB), "sweep", str(folder), "3"], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_no_byte_of_what_is_collected(tmp_path, kills):
  killed_at_random(tmp_path / "calm", 0, random.Random(0))
  killed_at_random(tmp_path / "killed", kills, random.Random(kills))
  calm = (tmp_path / "calm" / "results.csv").read_bytes()
  assert len(calm.splitlines()) == 13
  assert (tmp_path / "killed" / "results.csv").read_bytes() == calm
  # Nobody did a cell twice. A line may be missing: of a cell that was killed once it was finished.
  finishes = (tmp_path / "killed" / "finishes").read_text().split()
  assert len(finishes) == len(set(finishes)) and set(finishes) <= {"0", "1", "2"}


def test_interruption_stops_the_runs_in_order(tmp_path):
  cells = [stubs.cell(tmp_path, seed, "slow") for seed in range(2)]
  begun = []

  def interrupt():
    try:
      wait_until(lambda: all((cell.workdir / "metrics.jsonl").exists() for cell in cells), 60)
    finally:
      begun.append(time.monotonic())
      os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  with pytest.raises(SystemExit), interruption.interruptible(io.StringIO()):
    sweep(cells, processes=2)
  assert time.monotonic() - begun[0] < 25  # far from the 120 s that they take
  assert statuses(cells) == [Status.STOPPED] * 2
  assert "interrupted; run the same command to resume" in cells[0].log.read_text()
  assert locks.owner(cells[0].workdir) is None


def test_memory_holds_cells_back_and_refuses_what_never_fits(tmp_path):
  cells = [stubs.cell(tmp_path, seed, memory=3.0) for seed in range(2)]
  out = sweep(cells, processes=2, memory=4.0)
  first = out.index("seed0: finished")
  assert first < out.index("seed1: running")  # one after the other
  big = stubs.cell(tmp_path, 2, memory=1e6)
  assert re.search(
    r"needs 1e\+06 GiB of memory; this machine has \d+", local.lacks(big, local.Settings())
  )
  some = stubs.cell(tmp_path, 2, memory=0.5)
  assert "local.memory allows 0.25" in local.lacks(some, local.Settings(memory=0.25))
  assert local.lacks(some, local.Settings()) == ""


def test_an_idle_sweep_uses_no_core(tmp_path):
  """CPU time of this process while it waits for a slow cell, with many others in the table."""
  cells = [stubs.cell(tmp_path, seed, "slow") for seed in range(2)]
  others = [stubs.cell(tmp_path, seed) for seed in range(2, 200)]
  out = io.StringIO()
  used = []

  def stop():
    used.append(time.process_time())
    time.sleep(2.0)
    used.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)

  threading.Timer(1.0, stop).start()
  with pytest.raises(KeyboardInterrupt), Board([*cells, *others], stream=out) as board:
    local.run(cells, local.Settings(processes=2), board)
  assert used[1] - used[0] < 0.8  # polling in a loop takes all of a core


def test_a_full_disk_begins_nothing(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  cell = stubs.cell(tmp_path, 0)
  with pytest.raises(OSError, match="No space left on device"):
    sweep([cell])
  assert not cell.workdir.exists()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"processes": 0}, "processes: 0; an integer from 1 is accepted"),
    ({"cores": -1}, "cores: -1; an integer from 0"),
    ({"memory": -1.0}, "memory: -1.0; GiB from 0"),
    ({"processes": 1000, "cores": 2}, "cores: 1000 processes with 2 cores each; this machine has"),
    ({"processes": 2, "devices": (0,)}, r"devices: \(0,\) for 2 processes; one for each"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    local.Settings(**settings)


def test_executors_are_named(tmp_path):
  with pytest.raises(ValueError, match="executor: 'pbs' is not one of local, slurm, print"):
    executors.executor("pbs")
  out = io.StringIO()
  cell = stubs.cell(tmp_path, 0)
  printed = executors.executor("print")
  with Board([cell], stream=out) as board:
    printed.run([cell], printed.Settings(), board)
  assert out.getvalue().startswith("python ") and str(cell.workdir) in out.getvalue()
  assert work.last_end(cell) is None


def test_slurm_that_is_not_there_says_what_to_do(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  slurm = executors.executor("slurm")
  with pytest.raises(ValueError, match="needs sbatch, which is not on PATH; start the sweep on a"):
    slurm.require(slurm.Settings())
