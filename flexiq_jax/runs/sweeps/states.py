"""How far a cell is, read from its workdir alone, so that anybody can look from anywhere."""

import collections
import contextlib
import dataclasses
import datetime
import enum
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexiq_jax.runs import files, progress
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


def left(cell: Cell) -> str:
  """What a running cell says of the time that it still needs; empty where nothing is known.

  Where its rows are evaluated, they and their pace tell. Before that its log tells of the step
  that it is in, and the cell's minutes (of the config, or of finished cells like it) are an
  estimate of the whole.
  """
  now = datetime.datetime.now(datetime.UTC)
  lines = _lines(cell.workdir)
  if (rows := _rows_left(lines, now)) is not None:
    return f"{progress.duration(rows)} left"
  told = []
  if (step := _step_left(cell.log, now)) is not None:
    told.append(f"{progress.duration(step)} of this step left")
  since = _started(lines, now)
  if cell.minutes and since is not None and (whole := 60 * cell.minutes - since) > (step or 0.0):
    told.append(f"{progress.duration(whole)} in all (estimate)")
  return ", ".join(told)


def _rows_left(lines: Sequence[bytes], now: datetime.datetime) -> float | None:
  """Seconds by the pace of the rows; None before two are there, or where their number is not."""
  total, rows, times = 0, set(), []
  for line in lines:
    if _START in line:
      total, times = 0, []
    elif b'"event": "evaluation"' in line and (record := files.parse(line)):
      total = record["rows"]
    elif b'"event": "result"' in line and (record := files.parse(line)):
      rows.add((record["method"], record["ratio"], record["seed"]))
      times.append(_time(line))
  times = [time for time in times if time]
  if not total or len(times) < 2:
    return None
  pace = (times[-1] - times[0]).total_seconds() / (len(times) - 1)
  return max(0.0, (total - len(rows)) * pace - (now - times[-1]).total_seconds())


def _step_left(log: Path, now: datetime.datetime) -> float | None:
  """Seconds by the last line of a log, which `progress.Progress` wrote; None if it did not."""
  found = re.search(r", about ([\d.]+ \w+(?: \d+ \w+)?) left", work.last_line(log))
  if found is None:
    return None
  with contextlib.suppress(ValueError, OSError):
    return max(0.0, progress.seconds(found[1]) - (now.timestamp() - log.stat().st_mtime))
  return None


def _started(lines: Sequence[bytes], now: datetime.datetime) -> float | None:
  """Seconds since the run was last started; None where it has not been."""
  starts = (_time(line) for line in reversed(lines) if _START in line)
  begin = next(filter(None, starts), None)
  return (now - begin).total_seconds() if begin else None


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
