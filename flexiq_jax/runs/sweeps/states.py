"""How far a cell is, read from its workdir alone, so that anybody can look from anywhere."""

import collections
import dataclasses
import datetime
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps import locks, work
from flexiq_jax.runs.sweeps.cells import Cell


class Status(enum.StrEnum):
  """What a cell is; `missing` cannot start here, `stopped` was interrupted and will resume."""

  FINISHED = "finished"
  RUNNING = "running"
  QUEUED = "queued"
  WAITING = "waiting"
  STOPPED = "stopped"
  FAILED = "failed"
  MISSING = "missing"


_START = b'"event": "start"'  # in a line of the log
ENDED = (Status.FINISHED, Status.FAILED, Status.MISSING)  # a sweep does nothing more about these


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """A cell's status; `message` says why or who, `step` what a running one does."""

  status: Status
  message: str = ""
  step: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Took:
  """What a run has taken so far: seconds of all attempts, and GiB of host memory (0: unknown)."""

  seconds: float = 0.0
  memory: float = 0.0


def state(cell: Cell) -> State:
  """The state of a cell now."""
  if cell.other:
    return State(status=Status.MISSING, message=cell.other)
  if cell.finished:
    return State(status=Status.FINISHED)
  if owner := locks.owner(cell.workdir):
    return State(status=Status.RUNNING, message=owner, step=work.last_line(cell.log))
  if job := work.job(cell):
    return State(status=Status.QUEUED, message=f"job {job}")
  if ended := work.last_end(cell):
    failed = bool(ended.get("failed"))
    return State(
      status=Status.FAILED if failed else Status.STOPPED, message=str(ended.get("message", ""))
    )
  if cell.missing:
    return State(status=Status.MISSING, message=cell.missing)
  if cell.log.exists():  # nobody was left to note how it ended
    return State(status=Status.STOPPED, message="killed before it could say why")
  return State(status=Status.WAITING)


def took(workdir: Path) -> Took:
  """What a run has taken, from its events."""
  seconds, memory, begin, last = 0.0, 0.0, None, None
  for line in _lines(workdir):
    if _START in line:
      seconds += (last - begin).total_seconds() if begin and last else 0.0
      begin = last = _time(line)
    elif b'"event": "done"' in line and (record := files.parse(line)):
      last = _time(line)
      memory = record.get("peak_memory", {}).get("host", 0) / 2**30
    else:
      last = _time(line) or last
  seconds += (last - begin).total_seconds() if begin and last else 0.0
  return Took(seconds=seconds, memory=memory)


def started(workdir: Path) -> float | None:
  """Seconds since the run was last started; None where it has not been."""
  starts = (_time(line) for line in reversed(_lines(workdir)) if _START in line)
  begin = next(filter(None, starts), None)
  return (datetime.datetime.now(datetime.UTC) - begin).total_seconds() if begin else None


def last_start(workdir: Path) -> dict[str, Any]:
  """The event with which the run was last started; empty where it has not been."""
  starts = (files.parse(line) for line in reversed(_lines(workdir)) if _START in line)
  return next(filter(None, starts), {})


def expected(cells: Sequence[Cell]) -> list[Cell]:
  """The cells with the measured time and memory of their finished like in place of estimates.

  Alike are cells that differ in the seed alone.
  """
  found: Mapping[tuple, list[Took]] = collections.defaultdict(list)
  for cell in cells:
    if cell.finished and (one := took(cell.workdir)).seconds:
      found[_kind(cell)].append(one)
  better = []
  for cell in cells:
    if peers := found.get(_kind(cell)):
      minutes = sum(peer.seconds for peer in peers) / len(peers) / 60
      memory = max(peer.memory for peer in peers)
      cell = dataclasses.replace(cell, minutes=minutes, memory=memory or cell.memory)
    better.append(cell)
  return better


def _kind(cell: Cell) -> tuple:
  return tuple((name, str(v)) for name, v in sorted(cell.labels.items()) if name != "seed")


def _lines(workdir: Path) -> list[bytes]:
  """The lines of a run's log; none where there is no log."""
  try:
    return (workdir / "metrics.jsonl").read_bytes().splitlines()
  except OSError:
    return []


def _time(line: bytes) -> datetime.datetime | None:
  """The time stamp that an event's line begins with."""
  try:
    return datetime.datetime.fromisoformat(line[:64].split(b'"')[3].decode())
  except (ValueError, IndexError):
    return None
