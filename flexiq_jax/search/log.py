"""`search.csv` of a workdir: how every search went, one row a step.

A step is a generation of an evolutionary search, a round of a search on a surrogate.

| column     | what it holds                                                                      |
| ---------- | ---------------------------------------------------------------------------------- |
| `method`   | name of the search method                                                          |
| `ratio`    | level that is searched, 0..1; empty where all levels are scored at once            |
| `seed`     | seed of the search                                                                 |
| `step`     | number of the step at this level; 0 is the seeds                                   |
| `forwards` | cost since the search of this method and seed began, in passes over all its images |
| `seconds`  | time spent searching since then, earlier starts of a resumed run included          |
| `best`     | fitness of the best so far at this level: distance, mean per image                 |
| `mean`     | mean of the finite fitnesses of this step's candidates; empty where none is finite |
| `differ`   | share 0..1 of candidates that differ from their parents; empty without parents     |
| `stage`    | what the step did, as `seeds`, `evolution`, `gram`, `polish`                       |

Rows are appended and on the disk before `add` returns, so a checkpoint that is saved after it never
counts rows that a crash could lose. A last line without its end is what a crash left of a row: it
is not read, and is cut off by the next row. Several processes may write to one file, each its own
(method, seed).
"""

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flexiq_jax.runs import files


class _Column(NamedTuple):
  """What the cells of a column hold."""

  kind: type
  expected: str
  low: float = -math.inf
  high: float = math.inf
  optional: bool = False


_SPEC = {
  "method": _Column(str, "a name of one line"),
  "ratio": _Column(float, "a fraction in 0..1, or None", 0, 1, optional=True),
  "seed": _Column(int, "a whole number"),
  "step": _Column(int, "a whole number, not negative", 0),
  "forwards": _Column(float, "a finite number, not negative", 0),
  "seconds": _Column(float, "a finite number, not negative", 0),
  "best": _Column(float, "a finite number"),
  "mean": _Column(float, "a finite number, or None", optional=True),
  "differ": _Column(float, "a fraction in 0..1, or None", 0, 1, optional=True),
  "stage": _Column(str, "a name of one line"),
}
COLUMNS = tuple(_SPEC)
_HEADER = ",".join(COLUMNS)


class SearchLog:
  """Reads and writes one `search.csv`."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a log; the file is made by its first row.

    Args:
      path: the file; its folder must exist once a row is added.
    """
    self.path = Path(path)

  def rows(self, method: str | None = None, seed: int | None = None) -> list[dict[str, Any]]:
    """Reads the rows, oldest first.

    Args:
      method: only the rows of this method.
      seed: only the rows of this seed.

    Returns:
      A dict for each row with the keys `COLUMNS`; an empty cell is None. No rows where there is no
      file.

    Raises:
      ValueError: the file is no search log, or a row of it is damaged; names the line.
    """
    return [
      row
      for _, row in self._read()
      if method in (None, row["method"]) and seed in (None, row["seed"])
    ]

  def add(
    self,
    *,
    method: str,
    ratio: float | None,
    seed: int,
    step: int,
    forwards: float,
    seconds: float,
    best: float,
    mean: float | None,
    stage: str,
    differ: float | None = None,
  ) -> None:
    """Appends a row; see the table above for the columns and their units.

    Raises:
      ValueError: a value is not what its column holds (numbers are finite, names are not empty and
        of one line), or the file is no search log.
    """
    row = _checked(
      {
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "step": step,
        "forwards": forwards,
        "seconds": seconds,
        "best": best,
        "mean": mean,
        "differ": differ,
        "stage": stage,
      }
    )
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerow(row)
    with files.locked(self.path.parent):
      if self._begins():
        # No row is a JSON object, so whatever lacks its line break goes.
        files.cut_half_line(self.path)
      else:
        files.write_text(self.path, f"{_HEADER}\n")
      with self.path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())

  def cut(self, method: str, seed: int, keep: int) -> int:
    """Drops what a search wrote after the checkpoint that it resumes from.

    Args:
      method: name of the method.
      seed: seed of the search.
      keep: how many rows of this method and seed stay, the oldest ones.

    Returns:
      How many rows were dropped. The rows of other searches stay as they are.

    Raises:
      ValueError: there are fewer than `keep` rows, or the file is no search log.
    """
    with files.locked(self.path.parent):
      table = self._read()
      own = [i for i, (_, r) in enumerate(table) if (r["method"], r["seed"]) == (method, seed)]
      if not 0 <= keep <= len(own):
        raise ValueError(
          f"keep is {keep}, and {self.path} holds {len(own)} rows of {method!r} with seed {seed}: "
          f"expected 0..{len(own)}. Restore the file, or search again without the checkpoint"
        )
      dropped = set(own[keep:])
      if dropped:
        kept = [_HEADER, *(line for i, (line, _) in enumerate(table) if i not in dropped)]
        files.write_text(self.path, "\n".join(kept) + "\n")
      return len(dropped)

  def _begins(self) -> bool:
    """Whether the file is there with its whole header.

    Raises:
      ValueError: it begins with something else.
    """
    if not self.path.exists():
      return False
    with self.path.open("rb") as file:
      first = file.readline()
    header = f"{_HEADER}\n".encode()
    if not header.startswith(first):
      raise ValueError(
        f"{self.path} is no search log: its first line is {first[:60]!r}, expected {_HEADER!r}. "
        "Restore the file or move it away"
      )
    return first == header

  def _read(self) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines after the header, as they stand and as rows."""
    if not self._begins():
      return []
    # By bytes: half a line may end in half a character.
    _, *lines, _ = self.path.read_bytes().split(b"\n")
    return [_parse(self.path, number, line) for number, line in enumerate(lines, 2)]


def _parse(path: Path, number: int, line: bytes) -> tuple[str, dict[str, Any]]:
  try:
    text = line.decode()
    (cells,) = csv.reader([text], strict=True)
    if len(cells) != len(_SPEC):
      raise ValueError(f"it has {len(cells)} cells, expected {len(_SPEC)}")
    named = zip(_SPEC.items(), cells, strict=True)
    return text, _checked({name: c.kind(cell) if cell else None for (name, c), cell in named})
  except (ValueError, csv.Error) as error:
    raise ValueError(
      f"{path}, line {number}, is no row of a search log ({error}): restore or remove that line"
    ) from error


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
  """The row as plain values, each what its column holds."""
  plain = files.to_plain(row)  # nan and the infinities become texts
  for name, column in _SPEC.items():
    value = plain[name]
    if value is None and column.optional:
      continue
    if column.kind is str:
      good = isinstance(value, str) and value.isprintable() and value.strip()
    else:
      good = type(value) in (int, column.kind) and column.low <= value <= column.high
    if not good:
      raise ValueError(f"{name} is {row[name]!r}: expected {column.expected}")
    plain[name] = column.kind(value)
  if plain["ratio"] is not None:
    plain["ratio"] = round(plain["ratio"], 6)  # 0.1 + 0.2 and 0.3 are one level
  return plain
