"""One attempt at a cell: its process, its log, and a note on how it ended."""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexiq_jax.runs import files, interruption
from flexiq_jax.runs.sweeps import locks
from flexiq_jax.runs.sweeps.cells import Cell

_LAUNCH = Path(__file__).with_name("launch.py")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_STOPPED = (interruption.INTERRUPTED, 128 + signal.SIGTERM)  # ended in order by a signal
_MARK = "=== "  # begins the line of the log with which an attempt starts
_LONGEST = 400  # characters of a message


@dataclasses.dataclass(frozen=True)
class Attempt:
  """A process that works on a cell."""

  cell: Cell
  lock: locks.Lock | None
  process: subprocess.Popen

  def stop(self, number: int = signal.SIGTERM) -> None:
    """Sends a signal to the run and all it started."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, number)
      os.killpg(self.process.pid, signal.SIGCONT)  # one that is suspended would not notice

  def wait(self, seconds: float = float("inf")) -> bool:
    """Waits for the process without taking note of it; False where it goes on after that time.

    No lock is held meanwhile, so a signal's handler may wait, too.
    """
    deadline = time.monotonic() + seconds
    flags = os.WEXITED | os.WNOWAIT | (os.WNOHANG if seconds < float("inf") else 0)
    with contextlib.suppress(ChildProcessError):  # somebody took note of it already
      while os.waitid(os.P_PID, self.process.pid, flags) is None:
        if time.monotonic() > deadline:
          return False
        time.sleep(0.05)
    return True

  def end(self) -> None:
    """Waits for the process, notes how it ended and frees the cell."""
    status = self.process.wait()
    if self.lock is not None:
      with contextlib.suppress(OSError):  # of a full disk: the log says so, too
        _note(self.cell, status)
      self.lock.release()


def start(
  cell: Cell,
  lock: locks.Lock | None,
  *,
  cores: Sequence[int] = (),
  environment: Mapping[str, str] | None = None,
  log: str = "log.txt",
) -> Attempt:
  """Starts or resumes a cell's run.

  Args:
    cell: the cell.
    lock: on it; None for the further processes of a run of several.
    cores: that the run may use; all if empty.
    environment: variables that are set beside those of this process.
    log: name of the log in the cell's workdir, which is appended to.
  """
  if lock is not None:
    note(cell).unlink(missing_ok=True)
  variables = {**os.environ, **(environment or {})}
  if cores:
    variables |= {name: str(len(cores)) for name in _THREADS}
  now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
  path = cell.workdir / log
  with files.named(path), path.open("ab") as file:
    file.write(f"{_MARK}{now}: {shlex.join(cell.command)}\n".encode())
    file.flush()
    process = subprocess.Popen(
      [
        *(sys.executable, str(_LAUNCH), str(os.getpid()), ",".join(map(str, cores))),
        *(sys.executable if cell.command[0] == "python" else cell.command[0], *cell.command[1:]),
      ],
      cwd=cell.folder,
      env=variables,
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      # Ctrl-C is for the sweep, which stops its runs itself.
      start_new_session=True,
      pass_fds=() if lock is None else (lock.descriptor,),
    )
  return Attempt(cell, lock, process)


def note(cell: Cell) -> Path:
  """Where the end of the last attempt is noted; the file is not there while one is under way."""
  return cell.workdir / ".cell.json"


def job(cell: Cell) -> str:
  """The cluster's job that a cell waits in; empty where there is none."""
  try:
    return job_file(cell).read_text().strip()
  except OSError:
    return ""


def job_file(cell: Cell) -> Path:
  """Where the job's number is kept, as long as the cluster has the job."""
  return cell.workdir / ".cell.job"


def last_end(cell: Cell) -> dict[str, Any] | None:
  """How the last attempt ended: `failed`, `status`, `message`; None where nothing is noted."""
  try:
    return files.parse(note(cell).read_bytes())
  except OSError:
    return None


def last_line(path: Path) -> str:
  """The last line of the last attempt's log, or nothing."""
  lines = _last_attempt(path)
  return lines[-1] if lines else ""


def _note(cell: Cell, status: int) -> None:
  if cell.finished:
    return
  stopped = status < 0 or status in _STOPPED
  if status < 0:
    message = f"killed by {signal.Signals(-status).name}"
    message += ", perhaps for want of memory" if -status == signal.SIGKILL else ""
  else:
    message = _message(cell.log) or f"exit status {status}"
  record = {"failed": not stopped, "status": status, "message": message}
  files.write_text(note(cell), json.dumps(record) + "\n")


def _message(path: Path) -> str:
  """What a run said last: its error from where that begins, else its last line."""
  lines = _last_attempt(path)
  begins = [i for i, line in enumerate(lines) if line.startswith("error: ")]
  said = " ".join(lines[begins[-1] :]) if begins else (lines or [""])[-1]
  return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _last_attempt(path: Path) -> list[str]:
  """The lines that are not empty of the last attempt, of the log's last 16 KiB."""
  try:
    with path.open("rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
      text = file.read().decode(errors="replace")
  except OSError:
    return []
  text = re.split(rf"^{_MARK}.*$", text, flags=re.MULTILINE)[-1]
  return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
