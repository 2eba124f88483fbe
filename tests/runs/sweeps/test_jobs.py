"""The SLURM executor with `sbatch` and `squeue` that only write down what they were asked."""

import io
import os
import re
import signal
import stat
import threading

import pytest

from flexiq_jax.runs import interruption
from flexiq_jax.runs.sweeps import locks, states, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.executors import slurm
from flexiq_jax.runs.sweeps.states import Status
from tests.runs.sweeps import stubs_for_test as stubs

SBATCH = """#!/bin/sh
echo "$@" >> {folder}/asked
cp "$1" {folder}/script.$(wc -l < {folder}/asked | tr -d ' ')
[ -e {folder}/refuse ] && echo "sbatch: error: invalid partition specified: gpu" >&2 && exit 1
echo "Submitted batch job $((6 + $(wc -l < {folder}/asked)))"
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
  """A folder with the programs; its file `queue` is what squeue says."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name, text in {
    "sbatch": SBATCH,
    "srun": "#!/bin/sh\n",
    "squeue": "#!/bin/sh\ncat {folder}/queue\n",
  }.items():
    (folder / name).write_text(text.format(folder=folder))
    (folder / name).chmod(stat.S_IRWXU)
  (folder / "queue").write_text("")
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  monkeypatch.setattr(slurm, "_POLL", 0.2)
  return folder


def sweep(cells, **settings):
  out = io.StringIO()
  with Board(cells, stream=out) as board:
    board.interval = 0.1
    try:
      slurm.run(cells, slurm.Settings(**settings), board)
    finally:
      sweep.said = out.getvalue()
  return out.getvalue()


def test_ctrl_c_leaves_jobs_alone_and_they_are_not_submitted_twice(tmp_path, queue):
  cells = [stubs.cell(tmp_path / "sweep", seed, minutes=50.0, memory=2.0) for seed in range(3)]
  (queue / "queue").write_text("7_0\n7_1\n7_2\n99\n")
  threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
  with pytest.raises(SystemExit), interruption.interruptible(io.StringIO()):
    sweep(cells, partition="gpu", cores=4, notice=77, restarts=3)
  assert "submitted 3 cells as job 7\n" in sweep.said
  assert "3 jobs go on; the same command, or --config.watch, shows them again" in sweep.said
  assert sweep.said.rstrip().endswith("To stop them: scancel 7")
  assert [states.state(cell) for cell in cells][2].message == "job 7_2"
  script = (queue / "script.1").read_text()
  for line in (
    *("--array=0-2%3", "--partition=gpu", "--cpus-per-task=4", "--signal=USR2@77", "--requeue"),
    *("--time=100", "--mem=3GB", "--job-name=sweep"),
  ):
    assert re.search(rf"^#SBATCH {line}$", script, re.MULTILINE), (line, script)
  # Started again, the jobs are found; one that SLURM has forgotten is submitted anew.
  (queue / "queue").write_text("7_0\n7_2\n8\n")
  threading.Timer(1.0, (queue / "queue").write_text, ("",)).start()
  assert "submitted 1 cell as job 8\n" in sweep(cells)
  assert len((queue / "asked").read_text().splitlines()) == 2
  assert {states.state(cell).status for cell in cells} == {Status.WAITING}  # nobody ran them


def test_cells_of_other_needs_are_other_jobs(tmp_path, queue):
  cells = [
    stubs.cell(tmp_path / "sweep", 0, gpus=1),
    stubs.cell(tmp_path / "sweep", 1),
    stubs.cell(tmp_path / "sweep", 2, tasks=2),
  ]
  out = sweep(cells)
  assert out.count("submitted 1 cell as job") == 3
  scripts = [path.read_text() for path in sorted(queue.glob("script.*"))]
  assert ["--gpus-per-node=1" in s for s in scripts] == [True, False, False]
  assert ["--ntasks-per-node=2" in s for s in scripts] == [False, False, True]
  assert all("--time=60" in s and "--mem=" not in s for s in scripts)


def test_what_slurm_refuses_is_told(tmp_path, queue):
  (queue / "refuse").touch()
  cell = stubs.cell(tmp_path / "sweep", 0)
  with pytest.raises(ValueError, match=r"refused the jobs of stub-seed0: .*invalid part"):
    sweep([cell], partition="gpu")
  assert states.state(cell).status == Status.WAITING


def test_a_job_runs_its_cell_and_leaves_one_that_somebody_runs(tmp_path):
  cell = stubs.cell(tmp_path, 0)
  cell.workdir.mkdir()
  work.job_file(cell).write_text("7_0\n")
  lock = locks.take(cell.workdir)
  assert slurm.Job(cell)() == "somebody else runs this cell"
  lock.release()
  assert slurm.Job(cell)() == Status.FINISHED
  assert not work.job_file(cell).exists()
  assert slurm.Job(cell)() == "finished before"
  slurm._attempts.clear()


@pytest.mark.parametrize("first", [(), (signal.SIGUSR2,), (signal.SIGTERM,)])
def test_a_checkpoint_stops_the_run_in_order(tmp_path, first):
  """As submitit calls it: by a signal's handler, while the job waits for its run.

  SLURM sends that signal to all processes of a job, and SIGTERM before it where it preempts one.
  """
  cell = stubs.cell(tmp_path, 0, "slow")
  sent = []

  def handler(*_):
    sent.append(slurm.Job(cell).checkpoint())
    raise InterruptedError

  before = signal.signal(signal.SIGUSR2, handler)
  try:
    for number in first:
      threading.Timer(1.0, lambda n=number: slurm._attempts[0].stop(n)).start()
    last = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR2))
    last.start()
    with pytest.raises(InterruptedError):
      slurm.Job(cell)()
  finally:
    last.cancel()
    signal.signal(signal.SIGUSR2, before)
    slurm._attempts.clear()
  assert sent[0].function.cell == cell  # what goes back to the queue
  assert states.state(cell).status == Status.STOPPED
  assert "interrupted; run the same command to resume" in cell.log.read_text()
