"""A lock on a cell, with its owner and age.

The lock is the system's (`flock`) on a file in the cell's workdir, and the processes of the run
inherit it: it is free once the sweep and its run are both gone, however they ended. Some network
file systems keep such locks within one host; there the file's age counts: an owner on another host
who touched it within `STALE` seconds still holds it.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from flexiq_jax.runs import files

BEAT = 30.0  # seconds after which an owner touches its lock
STALE = 150.0
_TRIES, _PAUSE = 10, 0.03  # another process may only be looking


@dataclasses.dataclass(frozen=True)
class Lock:
  """A lock that this process holds; `descriptor` is to be inherited by the run."""

  path: Path
  descriptor: int

  def beat(self) -> None:
    """Shows other hosts that the owner lives."""
    with contextlib.suppress(OSError):
      os.utime(self.descriptor)

  def release(self) -> None:
    """Frees the lock, for this process at least."""
    with contextlib.suppress(OSError):
      os.ftruncate(self.descriptor, 0)
    os.close(self.descriptor)


def take(workdir: Path) -> Lock | None:
  """Takes a cell's lock; None where somebody else has it."""
  workdir.mkdir(parents=True, exist_ok=True)
  path = _path(workdir)
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    for _ in range(_TRIES):
      if _try(descriptor, fcntl.LOCK_EX):
        break
      time.sleep(_PAUSE)
    else:
      os.close(descriptor)
      return None
    if _elsewhere(descriptor) or _by_hand(workdir):
      os.close(descriptor)
      return None
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
    os.ftruncate(descriptor, 0)
    with files.named(path):
      os.pwrite(descriptor, json.dumps(owner).encode(), 0)
  except OSError:
    os.close(descriptor)
    raise
  return Lock(path, descriptor)


def owner(workdir: Path) -> str | None:
  """Who runs a cell, as `process 12 on host, since ...`; None where nobody does."""
  return _by_a_sweep(workdir) or _by_hand(workdir)


def _by_a_sweep(workdir: Path) -> str | None:
  with _opened(_path(workdir)) as descriptor:
    if descriptor is None or not os.fstat(descriptor).st_size:
      return None  # released, or being taken
    if _try(descriptor, fcntl.LOCK_SH) and not _elsewhere(descriptor):
      return None
    record = _read(descriptor)
    return "process {process} on {host}, since {since}".format(**record) if record else "a process"


def _by_hand(workdir: Path) -> str | None:
  """Who runs the cell's command without a sweep; asked only where no sweep does.

  A run begins with this lock (`Workdir.held`), and looking at it takes it for a moment.
  """
  with _opened(workdir / ".running") as descriptor:
    if descriptor is None or _try(descriptor, fcntl.LOCK_SH):
      return None
    return os.pread(descriptor, 4096, 0).decode(errors="replace") or "a process"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
  """A file's descriptor, None where there is no file."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except OSError:
    yield None
    return
  try:
    yield descriptor
  finally:
    os.close(descriptor)


def _path(workdir: Path) -> Path:
  return workdir / ".cell.lock"


def _try(descriptor: int, kind: int) -> bool:
  try:
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _elsewhere(descriptor: int) -> bool:
  """Whether an owner on another host has touched the file of late."""
  record = _read(descriptor)
  if not record or record.get("host") == socket.gethostname():
    return False
  return time.time() - os.fstat(descriptor).st_mtime < STALE


def _read(descriptor: int) -> dict | None:
  record = files.parse(os.pread(descriptor, 4096, 0))
  return record if record and {"host", "process", "since"} <= record.keys() else None
