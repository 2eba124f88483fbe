"""The rows of all cells of a sweep in one CSV, each with what it took to make it.

| column | what it holds |
|---|---|
| `cell`, and the labels of the sweep | which run |
| `status`, `reason` | `finished`; else what the cell is and why, in one row without numbers. Of a |
| | finished cell: in what it differs from the plan, or rows of before an `--overrule` |
| `method`, `ratio`, `seed`, ... | the run's own columns (see `workdir`) |
| `config`, `commit` | name and hash of the config, and the commit |
| `device`, `python`, `jax`, ... | where it ran last, and the versions |

Rows come in the order of the plan, columns in the order of first appearance: the same runs make the
same bytes.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexiq_jax.runs import files, workdir
from flexiq_jax.runs.sweeps import states
from flexiq_jax.runs.sweeps.cells import Cell

_ENVIRONMENT = {  # of a run's start -> column
  "device_kind": "device",
  "system": "system",
  **{name: name for name in ("python", "jax", "jaxlib", "flax", "numpy")},
}
_FIRST = ("cell", "status", "reason")
_LAST = ("config", "commit", *_ENVIRONMENT.values())
ANOTHER = "made with another config than the cell's (column config)"
Row = dict[str, Any]


def collect(cells: Sequence[Cell]) -> list[Row]:
  """Rows of all cells."""
  rows: list[Row] = []
  for cell in cells:
    state = states.state(cell)
    reason = cell.noted if cell.finished else _reason(state)
    front = {"cell": cell.name, "status": str(state.status), "reason": reason, **cell.labels}
    found = workdir.Workdir(cell.workdir).rows() if cell.finished else []
    environment = _environment(cell.workdir) if found else {}
    if cell.finished and not found:
      front["reason"] = "finished without a row"
    of = "" if cell.noted else config_name(cell)
    for row in found:
      own = {k: v for k, v in row.items() if v is not None}
      older = of and row.get("config") not in (None, of)
      rows.append({**front, **({"reason": ANOTHER} if older else {}), **own, **environment})
    if not found:
      rows.append(front)
  return rows


def kept(rows: Sequence[Row], before: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
  """Rows in which cells without numbers have those that they had before.

  Args:
    rows: as `collect` gives them.
    before: rows collected earlier.
    cells: the plan, which says what config a cell has now; rows of another one are marked.
  """
  configs = {cell.name: config_name(cell) for cell in cells}
  old: dict[str, list[Row]] = {}
  for row in before:
    if row["status"] == states.Status.FINISHED:
      same = row.get("config") in (None, configs.get(row["cell"]))
      old.setdefault(row["cell"], []).append(row if same else {**row, "reason": ANOTHER})
  found: list[Row] = []
  for row in rows:
    without = row["status"] != states.Status.FINISHED
    found += old.get(row["cell"], [row]) if without else [row]
  return found


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows as the text of a CSV file."""
  names = dict.fromkeys(name for row in rows for name in row)
  middle = [name for name in names if name not in (*_FIRST, *_LAST)]
  columns = [*_FIRST, *middle, *(name for name in _LAST if name in names)]
  text = io.StringIO()
  out = csv.DictWriter(text, columns, restval="", lineterminator="\n")
  out.writeheader()
  out.writerows(rows)
  return text.getvalue()


def read_csv(path: Path) -> list[Row]:
  """Rows back from a file; numbers are numbers, an empty cell is None.

  Raises:
    ValueError: it is no such table.
  """
  with path.open(newline="") as file:
    reader = csv.DictReader(file)
    if missing := [name for name in _FIRST if name not in (reader.fieldnames or ())]:
      raise ValueError(f"{path} has no column {missing[0]!r}: collect it anew")
    return [{k: _value(k, v) for k, v in row.items() if k} for row in reader]


def unfinished(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
  """Cell -> its status and reason, of the cells that have no numbers."""
  return {
    row["cell"]: f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
    for row in rows
    if row["status"] != states.Status.FINISHED
  }


def config_name(cell: Cell) -> str:
  """The config that a cell's rows name; empty where it is not known."""
  if not cell.config or "name" not in cell.config:
    return ""
  return f"{cell.config['name']}-{files.digest(cell.config)}"


def _reason(state: states.State) -> str:
  """What stays true of a cell: not which process runs it now."""
  return state.message if state.status in (states.Status.MISSING, states.Status.FAILED) else ""


def _environment(folder: Path) -> Row:
  """Device and versions of the last start."""
  record = states.last_start(folder)
  return {column: record[name] for name, column in _ENVIRONMENT.items() if name in record}


def _value(column: str, text: str | None) -> Any:
  if column in (*workdir.TEXT, *_FIRST, *_LAST):
    return text or None
  return workdir.number(text)
