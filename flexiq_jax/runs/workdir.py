"""What a run leaves in its workdir, and how a run that was stopped goes on.

| file            | what it holds                                                             |
| --------------- | ------------------------------------------------------------------------- |
| `config.json`   | the config of the run, written once, compared at every later start        |
| `metrics.jsonl` | one JSON object per line: time, event name, values; appended              |
| `results.csv`   | one row for each (method, ratio, seed); replaced as a whole, atomically   |
| `finished`      | JSON, there once the run is complete: the same command is then a no-op    |

Units, here and wherever rows are passed around: `ratio`, `mac_share` and `channel_share` are
fractions in 0..1; `top1` is a percentage in 0..100; `drop_float` and `drop_int8` are percentage
points below the float and the 8-bit model (positive is worse); `avg_bits` is a mean over MACs.

`config.json` and `results.csv` are written beside themselves and then moved into place, so a reader
sees the old file or the new one and never a half; `metrics.jsonl` may end in half a line after a
crash, which is not read and is cut off by the next event. Every row also goes to `metrics.jsonl`
first, so that a row which is written again keeps its history.
"""

import contextlib
import csv
import datetime
import fcntl
import io
import json
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexiq_jax.runs import files

KEY = ("method", "ratio", "seed")
COLUMNS = (
  *KEY,
  "top1",
  "drop_float",
  "drop_int8",
  "avg_bits",
  "mac_share",
  "channel_share",
  "images",
)


TEXT = ("method", "model", "data", "config", "commit")  # never read as numbers


class Workdir:
  """The only writer of a workdir's config, events, result rows and finished marker.

  Several processes may add rows to one workdir (one per seed, say): each addition reads the table
  again under a file lock.

  Attributes:
    path: the folder.
    about: columns that every row gets, from which a table over several workdirs tells runs apart.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Makes the folder where it is missing and proves that it can be written.

    A folder whose run is finished may be on storage that cannot be written.

    Args:
      path: folder of the run.

    Raises:
      ValueError: the folder cannot be made or written.
    """
    self.path = Path(path)
    self.about: dict[str, str] = {}
    if (self.path / "finished").exists():
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self.path) as probe:
        probe.write(b"x")
    except OSError as error:
      raise ValueError(
        f"workdir {str(self.path)!r} cannot be written ({error.strerror}): "
        "name a folder that you may write to and that has space left"
      ) from error

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Keeps other processes from running here; the system ends it if this process dies.

    Temporary files that a killed run left are removed.

    Raises:
      ValueError: another process runs here; names it, its host and its start.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    with (self.path / ".running").open("a+") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        raise ValueError(
          f"workdir {str(self.path)!r}: another process is running here ({file.read().strip()}); "
          "wait for it, or name another workdir"
        ) from None
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
      file.flush()
      with files.locked(self.path):
        files.remove_left_over(self.path)
      yield

  def config(self, config: Mapping[str, Any], *, overrule: bool = False) -> bool:
    """Writes the config, or compares it with the one that the workdir was started with.

    Args:
      config: nested mapping of plain values (arrays and paths are made plain).
      overrule: go on with a config that differs. The rows that are there stay and count as done;
        what differed becomes an event; a finished marker is taken away.

    Returns:
      True where the workdir holds a run with this config already, that is, where this run resumes.

    Raises:
      ValueError: the workdir belongs to another config; names the first fields that differ.
    """
    path = self.path / "config.json"
    new = files.to_plain(config)
    resumes = path.exists()
    if resumes:
      old = files.read_json(path)
      changes = files.differences(old, new)
      if not changes:
        return True
      if not overrule:
        shown = "; ".join(f"{name} was {a}, is now {b}" for name, a, b in changes[:3])
        more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
          f"workdir {str(self.path)!r} holds a run with another config: {shown}{more}. Name "
          "another workdir; or, to keep its rows and go on with the new config, overrule the old "
          "one (--overrule)"
        )
      self.event("config_overruled", changes=[list(change) for change in changes])
    # A marker without its config, or of another config, says nothing about this run.
    (self.path / "finished").unlink(missing_ok=True)
    text = json.dumps(new, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with files.locked(self.path):  # not while another process clears up (see `held`)
      files.write_text(path, text)
    return resumes

  def event(self, event: str, **values: Any) -> None:
    """Appends one line to `metrics.jsonl`; it is on the disk when this returns.

    Args:
      event: what happened, as `search` (see `search.log`) or `selected`.
      **values: scalars, strings, arrays, lists or mappings.

    Raises:
      ValueError: a value is called `time`, which is the name of the time stamp (UTC).
    """
    if "time" in values:
      raise ValueError("time is the event's own time stamp: call a duration seconds, say")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event} | files.to_plain(values), allow_nan=False)
    path = self.path / "metrics.jsonl"
    with files.locked(self.path), files.named(path), path.open("ab") as file:
      files.cut_half_line(path)
      file.write(line.encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())  # before a checkpoint that counts it

  def events(self, event: str | None = None) -> list[dict[str, Any]]:
    """Reads the events back, all or those of one name, oldest first.

    Raises:
      ValueError: a line other than the last is no JSON object.
    """
    path = self.path / "metrics.jsonl"
    if not path.exists():
      return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
      record = files.parse(line)
      if record is not None:
        found.append(record)
      elif number < len(lines):
        raise ValueError(f"{path}, line {number}, is no JSON object: remove that line")
    return [r for r in found if event is None or r.get("event") == event]

  def row(self, method: str, ratio: float | None, seed: int | None, **values: Any) -> None:
    """Adds a result, or further columns to one that is there.

    Args:
      method: name of the method, as `flexiq_greedy`.
      ratio: 4-bit ratio in 0..1, or None where a method knows none.
      seed: seed of the run, or None where nothing is random.
      **values: columns of the row, see `COLUMNS` for the usual ones and their units. A value of
        None leaves the column as it is.

    Raises:
      ValueError: `method` is empty, `ratio` is outside 0..1, a value is no scalar, or
        `results.csv` is not readable.
    """
    key = _key(method, ratio, seed)
    ratio = None if ratio is None else round(float(ratio), 6)
    seed = None if seed is None else int(seed)
    values = files.to_plain(values | self.about)
    values = {name: v for name, v in values.items() if v is not None}
    for name, value in values.items():
      if isinstance(value, list | dict):
        raise ValueError(f"{name} is {value!r}: a cell of results.csv holds one number or a text")
    self.event("result", method=method, ratio=ratio, seed=seed, **values)
    with files.locked(self.path):
      table = self._table()
      table[key] = {
        **dict(zip(KEY, (method, ratio, seed), strict=True)),
        **table.get(key, {}),
        **values,
      }
      self._write(table)

  def has(self, method: str, ratio: float | None, seed: int | None) -> bool:
    """Whether the row is there, so that a resumed run need not compute it again."""
    return _key(method, ratio, seed) in self._table()

  def rows(self) -> list[dict[str, Any]]:
    """All rows in the order in which they were first written; an empty cell is None."""
    return list(self._table().values())

  def join(self, runs: Iterable["Workdir"]) -> None:
    """Takes the rows of other workdirs instead; of those alike in `KEY` the first counts."""
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run in runs:
      table |= {key: row for key, row in run._table().items() if key not in table}
    with files.locked(self.path):
      self._write(table)

  @property
  def finished(self) -> dict[str, Any] | None:
    """What `finish` wrote, or None while the run is not complete."""
    path = self.path / "finished"
    return files.read_json(path) if path.exists() else None

  def finish(self, **summary: Any) -> None:
    """Marks the run complete; call it last.

    Args:
      **summary: whatever a later start should be able to say, as `top1=91.8`.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"time": now} | files.to_plain(summary)
    files.write_text(self.path / "finished", json.dumps(record, indent=2, allow_nan=False) + "\n")

  def finished_message(self) -> str | None:
    """The line for a start that has nothing to do, or None while there is work."""
    record = self.finished
    if record is None:
      return None
    return (
      f"{self.path}: this run finished at {record.get('time')}; nothing to do. To run it again, "
      "name another workdir or delete this one."
    )

  def _write(self, table: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> None:
    extra = dict.fromkeys(name for r in table.values() for name in r if name not in COLUMNS)
    text = io.StringIO()
    out = csv.DictWriter(text, (*COLUMNS, *extra), restval="", lineterminator="\n")
    out.writeheader()
    out.writerows(table.values())
    files.write_text(self.path / "results.csv", text.getvalue())

  def _table(self) -> dict[tuple[str, str, str], dict[str, Any]]:
    path = self.path / "results.csv"
    if not path.exists():
      return {}
    with path.open(newline="") as file:
      reader = csv.DictReader(file)
      if missing := [name for name in KEY if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path} has no column {missing[0]!r}: restore the file or move it away")
      rows: list[dict[str, Any]] = [
        {k: (v or None) if k in TEXT else number(v) for k, v in r.items() if k} for r in reader
      ]
    return {_key(row["method"], row["ratio"], row["seed"]): row for row in rows}


def _key(method: str, ratio: float | None, seed: int | None) -> tuple[str, str, str]:
  """The row's identity; ratios that print alike are one ratio (0.1 + 0.2 and 0.3)."""
  if not isinstance(method, str) or not method:
    raise ValueError(f"method is {method!r}: expected a name, as 'flexiq_greedy'")
  if ratio is not None and not 0 <= ratio <= 1:
    raise ValueError(f"ratio is {ratio!r}: expected a fraction in 0..1, or None")
  share = "" if ratio is None else f"{float(ratio):.6f}"
  return method, share, "" if seed is None else str(int(seed))


def number(text: str | None) -> Any:
  """A cell as int or float where it reads as one, None where it is empty, else as text."""
  if not text:
    return None
  for kind in (int, float):
    with contextlib.suppress(ValueError):
      return kind(text)
  return text
