"""Runs cells as child processes of this one, several at a time, within cores and memory.

A slot is a place for one run: it has cores of its own, and a device where there are some. The
parent sleeps until a child ends or the display is due.
"""

import collections
import dataclasses
import multiprocessing.connection
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from flexiq_jax.runs.sweeps import locks, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.cells import Cell

_PATIENCE = 30.0  # seconds in which a run may end in order
_LEAST_SPACE = 2**24  # bytes of disk without which no run is begun
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TPU_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How much of this machine a sweep takes.

  Attributes:
    processes: runs at a time.
    cores: for each run, its own; 0 shares all that there are among them.
    memory: GiB for all runs together, by their estimates; 0: nine tenths of the machine's.
    devices: numbers of the accelerators, shared among the runs in turn; empty leaves all to each.
  """

  processes: int = 1
  cores: int = 0
  memory: float = 0.0
  devices: tuple[str | int, ...] = ()

  def __post_init__(self):
    """Checks the values."""
    for name in ("processes", "cores"):
      value, least = getattr(self, name), int(name == "processes")
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r}; an integer from {least} is accepted")
    if not 0 <= self.memory < 2**20:
      raise ValueError(f"memory: {self.memory!r}; GiB from 0 are accepted, 0 takes the machine's")
    if self.processes * self.cores > len(_cores()):
      raise ValueError(
        f"cores: {self.processes} processes with {self.cores} cores each; this machine has "
        f"{len(_cores())}"
      )
    if self.devices and len(self.devices) < self.processes:
      raise ValueError(f"devices: {self.devices} for {self.processes} processes; one for each")


def require(settings: Settings) -> None:
  """Always there."""


def lacks(cell: Cell, settings: Settings) -> str:
  """Why a cell cannot run on this machine."""
  if cell.gpus and not settings.devices and not _gpus():
    return f"needs {'a GPU' if cell.gpus == 1 else f'{cell.gpus} GPUs'}"
  if cell.tasks > 1:
    return f"needs {cell.tasks} processes: SLURM, or the command by hand as docs/clusters.md says"
  total, budget = machine_memory(), _budget(settings)
  if cell.memory > total:
    return f"needs {cell.memory:g} GiB of memory; this machine has {total:.0f}"
  if cell.memory > budget:
    return f"needs {cell.memory:g} GiB of memory; local.memory allows {budget:g}"
  return ""


def run(cells: Sequence[Cell], settings: Settings, board: Board) -> None:
  """Runs all cells; those that another sweep runs are waited for, and run where it gave them up.

  Raises:
    OSError: the disk is full; runs that are under way end first.
  """
  queue, slots = collections.deque(cells), _slots(settings)
  free, running = list(range(len(slots))), {}
  beaten, changed = time.monotonic(), []
  try:
    while queue or running:
      for _ in range(len(queue)):
        if not free:
          break
        cell = queue.popleft()
        used = sum(attempt.cell.memory for attempt, _ in running.values())
        if cell.finished:
          continue
        if used and used + cell.memory > _budget(settings):
          queue.append(cell)
          continue
        _require_space(cell.workdir)
        if (lock := locks.take(cell.workdir)) is None:
          queue.append(cell)
          continue
        if cell.finished:
          lock.release()
          continue
        slot = free.pop(0)
        cores, environment = slots[slot]
        attempt = work.start(cell, lock, cores=cores, environment=environment)
        running[_handle(attempt)] = attempt, slot
        changed.append(cell)
      board.update(changed)
      changed = []
      for handle in _ended(running, board.interval):
        attempt, slot = running.pop(handle)
        _close(handle)
        attempt.end()
        free.append(slot)
        changed.append(attempt.cell)
      if time.monotonic() - beaten > locks.BEAT:
        beaten = time.monotonic()
        for attempt, _ in running.values():
          attempt.lock.beat()
  finally:
    _stop([attempt for attempt, _ in running.values()])
  board.update(changed)


def machine_memory() -> float:
  """GiB of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _budget(settings: Settings) -> float:
  return settings.memory or 0.9 * machine_memory()


def _gpus() -> bool:
  return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _cores() -> list[int]:
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def _slots(settings: Settings) -> list[tuple[list[int], dict[str, str]]]:
  """Cores and variables of each slot."""
  cores, count = _cores(), settings.processes
  each = settings.cores or max(1, len(cores) // count)
  slots = []
  for i in range(count):
    own = [cores[(i * each + j) % len(cores)] for j in range(each)]
    if count == 1 and not settings.cores:
      own = []  # all, as without a sweep
    variables = {name: str(settings.devices[i]) for name in _VISIBLE} if settings.devices else {}
    slots.append((own, variables))
  return slots


def _handle(attempt: work.Attempt) -> int:
  """What can be waited for: a descriptor that becomes readable at the process's end."""
  if hasattr(os, "pidfd_open"):
    return os.pidfd_open(attempt.process.pid)
  return -attempt.process.pid


def _close(handle: int) -> None:
  if handle >= 0:
    os.close(handle)


def _ended(running: dict, seconds: float) -> list[int]:
  """Handles of the processes that ended, after that many seconds at most."""
  if running and all(handle >= 0 for handle in running):
    ready = set(multiprocessing.connection.wait([*running], seconds))
    return [handle for handle in running if handle in ready]
  time.sleep(min(seconds, 0.5) if running else seconds)
  return [h for h, (attempt, _) in running.items() if attempt.process.poll() is not None]


def _stop(attempts: Sequence[work.Attempt]) -> None:
  """Ends runs in order; those that do not end are killed."""
  for attempt in attempts:
    attempt.stop()
  deadline = time.monotonic() + _PATIENCE
  for attempt in attempts:
    if not attempt.wait(max(0.0, deadline - time.monotonic())):
      attempt.stop(signal.SIGKILL)
    attempt.end()


def _require_space(folder: Path) -> None:
  """Refuses to begin where the disk is as good as full: every run would fail alike."""
  there = next(path for path in (folder, *folder.parents) if path.exists())
  if shutil.disk_usage(there).free < _LEAST_SPACE:
    raise OSError(28, "No space left on device", str(there))
