"""A sweep: many ordinary runs from one command, and the tables that they fill.

What a sweep has in its folder: `NAME/`, the workdir of each cell with its log; `results.csv`, the
rows of all cells (see `flexiq_jax.runs.sweeps.collect`); `report.md` and `tables.tex`. The same
command goes on where it was stopped. Unlike a run, it does not hold its folder: several starts,
with any executor, may share the work.
"""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.shared.checks import field, require
from experiments.sweeps import found
from experiments.sweeps import tables as drawn
from experiments.sweeps.plan import plan
from flexiq_jax.runs import files, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.sweeps import cells as cells_of
from flexiq_jax.runs.sweeps import collect, executors, states
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.cells import Cell
from flexiq_jax.runs.sweeps.states import Status
from flexiq_jax.runs.workdir import Workdir

_QUIET = 3  # looks at cells none of which anybody works on, after which `watch` ends


def describe(config, folder: Path) -> str:
  """The plan: every cell with its state, estimates, command and what is missing."""
  cells, _, _ = _planned(config, folder)
  cells = _chosen(config, cells)
  body = []
  for cell in cells:
    state = states.state(cell)
    time_text = duration(60 * cell.minutes) if cell.minutes else tables.DASH
    memory = f"{cell.memory:.1f} GiB" if cell.memory else tables.DASH
    body.append([cell.name, str(state.status), state.message, time_text, memory])
  text = tables.text_table(["cell", "state", "why", "time", "memory"], body, left=3)
  left = [c for c in cells if states.state(c).status not in (Status.FINISHED, Status.MISSING)]
  total = sum(cell.minutes for cell in left)
  return "\n".join(
    [
      *(text, "", f"{len(cells)} cells, {len(left)} to be run"),
      *([f"together about {duration(60 * total)} of one process"] if total else []),
      "",
      *(shlex.join(cell.command) for cell in cells),
    ]
  )


def run(config, folder: Path, command: str) -> Path | None:
  """Runs, resumes or watches the cells, and collects what they have.

  Args:
    config: of the sweep.
    folder: of the sweep.
    command: the command line, for the report.

  Returns:
    The report's path; None where the sweep was only watched.

  Raises:
    ValueError: a field is wrong, the executor is not there, or cells failed (after the report).
  """
  cells, executor, settings = _planned(config, folder)
  chosen = _chosen(config, cells)
  if config.watch:
    _watch(chosen)
    return None
  with field("config", config):
    executor.require(settings)
  Workdir(folder)  # proves that it can be written
  todo = [cell for cell in chosen if _is_left(cell, config.retry)]
  with Board(chosen) as board:
    if todo:
      executor.run(todo, settings, board)
  path = report(config, cells, folder, command)
  ends = {cell.name: states.state(cell) for cell in cells}
  failed = [(n, s.message) for n, s in ends.items() if s.status == Status.FAILED]
  if failed:
    lines = "\n".join(f"  {name}: {message}" for name, message in failed)
    raise ValueError(
      f"{len(failed)} of {len(cells)} cells failed; the others are in {path}. Their logs are "
      f"NAME/log.txt; --config.retry runs them again\n{lines}"
    )
  return path


def report(config, cells: Sequence[Cell], folder: Path, command: str) -> Path:
  """Collects the rows of all cells into `results.csv`, `report.md` and `tables.tex`."""
  rows = collect.collect(cells)
  files.write_text(folder / "results.csv", collect.to_csv(rows))
  layouts = drawn.layouts(config)
  files.write_text(folder / "tables.tex", drawn.latex(layouts, rows))
  parts = [f"# {config.name}", "Command:", f"```sh\n{command}\n```"]
  parts += drawn.markdown(layouts, rows, folder)
  counts: dict[str, list[str]] = {}
  for name, why in collect.unfinished(rows).items():
    counts.setdefault(why, []).append(name)
  done = len(cells) - sum(map(len, counts.values()))
  parts.append(f"## Cells\n\n{done} of {len(cells)} have finished.")
  if counts:
    body = [[", ".join(names), why] for why, names in counts.items()]
    parts.append(tables.markdown_table(["cells without rows", "why"], body, left=2))
  parts.append("All rows, with config, commit, device and versions: [results.csv](results.csv).")
  return files.write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def _planned(config, folder: Path) -> tuple[list[Cell], ModuleType, Any]:
  """Cells with better estimates and what the executor lacks, the executor and its settings."""
  require(config, "sweep", "configs/table2.py")
  with field("config", config):
    executor = executors.executor(config.executor)
  section = config.get(config.executor, {})
  with field(f"config.{config.executor}", section):
    settings = executor.Settings(**section)
  drawn.layouts(config)  # a wrong one is told before anything runs
  with field("config", config):
    cells = found.claim(plan(config, folder), config.also, config.differ)
  checked = []
  for cell in states.expected(cells):
    why = cell.missing or executor.lacks(cell, settings)
    checked.append(dataclasses.replace(cell, missing=why))
  return checked, executor, settings


def _chosen(config, cells: Sequence[Cell]) -> Sequence[Cell]:
  """The cells to be run; all of them stay in the tables."""
  if not config.only:
    return cells
  with field("config", config):
    return cells_of.select(cells, config.only)


def _is_left(cell: Cell, retry: bool) -> bool:
  status = states.state(cell).status
  return status not in states.ENDED or (retry and status == Status.FAILED)


def _watch(cells: Sequence[Cell]) -> None:
  """Shows a sweep that runs elsewhere, until nobody works on it."""
  quiet = 0
  with Board(cells) as board:
    while quiet < _QUIET:
      board.update(cells)
      at_work = (Status.RUNNING, Status.QUEUED)
      busy = any(states.state(cell).status in at_work for cell in cells)
      quiet = 0 if busy else quiet + 1
      time.sleep(board.interval if busy else 0.5)
    print(board.summary())
