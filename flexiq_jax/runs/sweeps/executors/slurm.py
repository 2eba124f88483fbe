"""Submits cells to SLURM as job arrays, by submitit; one array for cells with the same needs.

A job starts the cell's ordinary command. When SLURM preempts it or its time is up, the run is
stopped in order, the job goes back to the queue, and the same command resumes the run. What the
sweep knows of a job it reads from the cell's workdir and from `squeue`, so that any later start,
and `watch`, knows as much.
"""

import collections
import contextlib
import dataclasses
import getpass
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from flexiq_jax.runs import files, interruption
from flexiq_jax.runs.sweeps import locks, states, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.cells import Cell
from flexiq_jax.runs.sweeps.states import Status

_ENDING = 60.0  # seconds that a run has to end in order, and SLURM to say why it ended it
_TERMINATED = (interruption.INTERRUPTED, -signal.SIGTERM)
_POLL = 5.0  # seconds between two looks at the queue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What jobs ask SLURM for.

  Attributes:
    partition, account, qos, constraint: as `sbatch` takes them; empty leaves SLURM's default.
    minutes: time limit of a job; 0 takes twice the cell's estimate, at least an hour.
    memory: GiB; 0 takes one and a half times the cell's estimate, or SLURM's default.
    cores: for each process of a run; 0 leaves SLURM's default.
    parallel: jobs of an array at a time.
    restarts: how often a job whose time is up goes back to the queue; preemption does not count.
    notice: seconds before the time limit at which a run is stopped.
    setup: shell lines in front of the command, as module loads.
  """

  partition: str = ""
  account: str = ""
  qos: str = ""
  constraint: str = ""
  minutes: int = 0
  memory: float = 0.0
  cores: int = 0
  parallel: int = 256
  restarts: int = 20
  notice: int = 120
  setup: tuple[str, ...] = ()

  def __post_init__(self):
    """Checks the values."""
    least = {"minutes": 0, "cores": 0, "parallel": 1, "restarts": 0, "notice": 1}
    for name, value in least.items():
      given = getattr(self, name)
      if isinstance(given, bool) or not isinstance(given, int) or given < value:
        raise ValueError(f"{name}: {given!r}; an integer from {value} is accepted")
    if self.memory < 0:
      raise ValueError(f"memory: {self.memory!r}; GiB from 0 are accepted")


@dataclasses.dataclass(frozen=True)
class Job:
  """What a job does; it is sent there as a pickle."""

  cell: Cell

  def __call__(self) -> str:
    """Runs the cell until it ends; returns what became of it."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    lock = locks.take(self.cell.workdir) if rank == 0 else None
    if rank == 0 and lock is None:
      return "somebody else runs this cell"
    if self.cell.finished:
      if lock is not None:
        lock.release()
      return "finished before"
    attempt = work.start(self.cell, lock, log=f"log.{rank}.txt" if rank else "log.txt")
    _attempts.append(attempt)
    over = threading.Event()
    if lock is not None:
      threading.Thread(target=_beat, args=(lock, over), daemon=True).start()
    attempt.wait()
    over.set()
    if attempt.process.poll() in _TERMINATED:
      # SLURM ends all processes of a job when it preempts it, and then, by the signal that submitit
      # asked for, lets the job go back to the queue (`checkpoint`). Until then it must not be done.
      time.sleep(_ENDING)
    attempt.end()
    if rank == 0:
      work.job_file(self.cell).unlink(missing_ok=True)
    return states.state(self.cell).status

  def checkpoint(self):
    """Stops the run in order, before the job goes back to the queue."""
    from submitit.helpers import DelayedSubmission

    for attempt in _attempts:
      attempt.stop()
      if not attempt.wait(_ENDING):
        attempt.stop(signal.SIGKILL)
      attempt.end()
    return DelayedSubmission(self)


_attempts: list[work.Attempt] = []  # of this process, which is a job: there is one at most


def require(settings: Settings) -> None:
  """Refuses where SLURM or submitit is not there."""
  if not shutil.which("sbatch"):
    raise ValueError(
      "executor: 'slurm' needs sbatch, which is not on PATH; start the sweep on a login node of "
      "the cluster, or take executor local (this machine) or print (commands for another scheduler)"
    )
  try:
    import submitit  # noqa: F401
  except ImportError:
    raise ValueError("executor: 'slurm' needs submitit; `pip install submitit`") from None


def lacks(cell: Cell, settings: Settings) -> str:
  """Nothing that is known here: SLURM refuses what its nodes do not have."""
  return ""


def run(cells: Sequence[Cell], settings: Settings, board: Board) -> None:
  """Submits all cells that no job has yet, and waits for them.

  Raises:
    ValueError: SLURM refused the jobs; says what it said.
    KeyboardInterrupt: by Ctrl-C; the jobs go on, and a line says how to stop them.
  """
  queued = _queue()
  by_needs: dict[tuple, list[Cell]] = collections.defaultdict(list)
  for cell in cells:
    if work.job(cell) not in queued:
      work.job_file(cell).unlink(missing_ok=True)
      if not locks.owner(cell.workdir):
        by_needs[_needs(cell, settings)].append(cell)
  for needs, group in by_needs.items():
    jobs = _shown(_submit(group, dict(needs), settings))
    cells_text = "1 cell" if len(group) == 1 else f"{len(group)} cells"
    board.say(f"submitted {cells_text} as job {jobs}")
  left = [*cells]
  try:
    while left:
      _sleep(max(board.interval, _POLL))
      with contextlib.suppress(ValueError, subprocess.TimeoutExpired):  # the controller restarts
        queued = _queue()
      for cell in left:
        if (job := work.job(cell)) and job not in queued:
          work.job_file(cell).unlink(missing_ok=True)  # SLURM has forgotten it
      board.update(left)
      left = [cell for cell in left if states.state(cell).status in (Status.RUNNING, Status.QUEUED)]
  except KeyboardInterrupt:
    jobs = sorted({work.job(cell) for cell in left} - {""})
    if jobs:
      board.say(
        f"\n{len(jobs)} jobs go on; the same command, or --config.watch, shows them again. To stop "
        f"them: scancel {_shown(jobs)}"
      )
    raise


def _needs(cell: Cell, settings: Settings) -> tuple[tuple[str, float], ...]:
  """Parameters of submitit that a cell's job has to have."""
  minutes = settings.minutes or max(60, round(2 * cell.minutes))
  memory = settings.memory or 1.5 * cell.memory
  needs = {"timeout_min": minutes, "tasks_per_node": cell.tasks, "gpus_per_node": cell.gpus}
  return tuple((needs | {"mem_gb": round(memory, 1)}).items())


def _submit(cells: Sequence[Cell], needs: dict, settings: Settings) -> list[str]:
  """Submits one array; returns the numbers of its jobs."""
  import submitit

  folder = cells[0].workdir.parent / ".jobs"
  folder.mkdir(parents=True, exist_ok=True)
  executor = submitit.SlurmExecutor(
    folder=str(folder / "%j"), max_num_timeout=settings.restarts, python=None
  )
  given = {name: getattr(settings, name) for name in ("partition", "account", "qos", "constraint")}
  needs = {name: value for name, value in needs.items() if value}
  executor.update_parameters(
    **{name: value for name, value in given.items() if value},
    **executor._convert_parameters(needs),
    **({"cpus_per_task": settings.cores} if settings.cores else {}),
    job_name=re.sub(r"\W", "_", cells[0].workdir.parent.name) or "sweep",
    array_parallelism=settings.parallel,
    signal_delay_s=settings.notice,
    setup=[*settings.setup, f"export PYTHONPATH={_root()}:$PYTHONPATH"],
    additional_parameters={"requeue": True},
    # Several processes of a run wait for each other; where one is gone, the rest are of no use.
    srun_args=["--kill-on-bad-exit=1"],
  )
  try:
    with executor.batch():
      jobs = [executor.submit(Job(cell)) for cell in cells]
  except Exception as error:  # submitit's own errors derive from Exception alone
    said = " ".join(str(getattr(error, "stderr", "") or error).split())
    raise ValueError(f"slurm: SLURM refused the jobs of {cells[0].name}: {said}") from error
  for cell, job in zip(cells, jobs, strict=True):
    cell.workdir.mkdir(parents=True, exist_ok=True)
    work.note(cell).unlink(missing_ok=True)
    files.write_text(work.job_file(cell), job.job_id + "\n")
  return [job.job_id for job in jobs]


def _root() -> Path:
  """The folder that holds this package, which jobs import."""
  return Path(__file__).resolve().parents[4]


def _queue() -> set[str]:
  """Numbers of this user's jobs that are pending, running or ending, as `12_3`."""
  command = ["squeue", "--noheader", "--array", "--format=%i", "--user", getpass.getuser()]
  try:
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
  except subprocess.CalledProcessError as error:
    raise ValueError(f"slurm: squeue failed: {' '.join(error.stderr.split())}") from None
  return set(said.stdout.split())


def _shown(jobs: Sequence[str]) -> str:
  """The jobs as arguments of scancel, arrays as a whole where all of one are given."""
  return " ".join(sorted({job.partition("_")[0] for job in jobs}))


def _sleep(seconds: float) -> None:
  threading.Event().wait(seconds)


def _beat(lock: locks.Lock, over: threading.Event) -> None:
  while not over.wait(locks.BEAT):
    with contextlib.suppress(OSError):
      lock.beat()
