"""Files that survive a crash: atomic text, lines of JSON, values that JSON can hold."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space on the disk, or none that this user may take
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}|.+\.part|.+\.orbax-checkpoint-tmp|\d+\.incomplete-\d+")


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
  """Puts a path to errors of a disk that is full, which the system gives without one.

  Raises:
    OSError: as it was, with the path.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in FULL or error.filename is not None:
      raise
    raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def require_space(folder: Path, size: int) -> None:
  """Checks that a folder's disk has room, before a library writes that reports this in many lines.

  Raises:
    OSError: ENOSPC or EDQUOT, with the folder.
  """
  probe = folder / f".space.{uuid.uuid4().hex}"
  with named(folder):
    try:
      with probe.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
          os.posix_fallocate(file.fileno(), 0, size)  # a quota shows only where space is taken
        elif shutil.disk_usage(folder).free < size:
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
      probe.unlink(missing_ok=True)


def remove_left_over(folder: Path) -> None:
  """Removes the temporary files and folders that a killed run left below a workdir.

  Workdirs below it, which other processes may run in, are left alone.
  """
  for path in folder.iterdir():
    if _LEFT_OVER.fullmatch(path.name):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)
    elif path.is_dir() and not path.is_symlink() and not (path / "config.json").exists():
      remove_left_over(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
  """Writes a file atomically: a reader, or a crash, meets the old content or the new.

  Args:
    path: the file; its folder must exist.
    text: the whole content, stored as UTF-8.

  Returns:
    The path.
  """
  return write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
  """The same for bytes."""
  path = Path(path)
  # In the same folder, since a rename is atomic within a file system only.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with named(path):
      with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """A lock on a folder's shared files; the system frees it if this process dies."""
  with (folder / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def to_plain(value: Any) -> Any:
  """Makes a value strict JSON: arrays to lists, paths to strings, nan and infinities to strings."""
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return float(value) if math.isfinite(value) else str(float(value))
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "items"):
    return {str(name): to_plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_plain(item) for item in value]
  if isinstance(value, set | frozenset):
    return sorted(to_plain(item) for item in value)
  if hasattr(value, "__array__"):
    return to_plain(np.asarray(value).tolist())
  return str(value)


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, str, str]]:
  """Compares two nested plain configs.

  Returns:
    (dotted field, old value, new value) as JSON text, `absent` where a side lacks the field, in
    the order of the fields' names.
  """
  if isinstance(old, dict) and isinstance(new, dict):
    changes = []
    for field in sorted(old.keys() | new.keys()):
      path = f"{name}.{field}" if name else field
      if field in old and field in new:
        changes += differences(old[field], new[field], path)
      else:
        sides = [json.dumps(side[field]) if field in side else "absent" for side in (old, new)]
        changes.append((path, *sides))
    return changes
  return [] if old == new else [(name, json.dumps(old), json.dumps(new))]


def digest(values: Any) -> str:
  """Eight letters that stand for nested values, such as a config."""
  text = json.dumps(to_plain(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def parse(line: bytes) -> dict[str, Any] | None:
  """A JSON object from one line, or None where the line is something else."""
  try:
    record = _decode(line)
  except (ValueError, RecursionError):
    return None
  return record if isinstance(record, dict) else None


def _decode(text: bytes) -> Any:
  """JSON in which no object has a key twice."""

  def pairs(items):
    found = dict(items)
    if len(found) < len(items):
      keys = [key for key, _ in items]
      raise ValueError(f"key {max(keys, key=keys.count)!r} stands more than once in an object")
    return found

  return json.loads(text, object_pairs_hook=pairs)


def cut_half_line(path: Path) -> None:
  """Repairs the end of a file of JSON lines that a crash left unfinished.

  Half a line is cut off; a whole one that lacks its line break gets it.
  """
  with path.open("rb+") as file:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
      return
    file.seek(size - 1)
    if file.read(1) == b"\n":
      return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if parse(content[start:]) is None:
      file.truncate(start)
    else:
      file.write(b"\n")  # only the line's end was lost


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    ValueError: it holds something else, or a key twice, or is nested too deeply.
  """
  try:
    record = _decode(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON object ({error}): restore the file or delete it") from None
  if not isinstance(record, dict):
    raise ValueError(f"{path} is no JSON object: restore the file or delete it")
  return record
