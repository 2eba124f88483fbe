"""Runs that are there already: which cell each is, and in what it differs from the plan."""

import copy
import dataclasses
import difflib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps import bases
from flexiq_jax import data
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps.cells import Cell

Changes = Sequence[tuple[str, str, str]]


def claim(cells: Sequence[Cell], folders: Iterable[str], differ: Collection[str]) -> list[Cell]:
  """The cells with the runs that are theirs.

  A cell whose own workdir holds no run takes a finished one of the same config from the folders. A
  run of another config in its own workdir is told (`Cell.other`).

  Args:
    cells: the cells.
    folders: that hold workdirs, or are such.
    differ: dotted fields in which a run may differ; its rows then say so (`Cell.noted`).

  Raises:
    ValueError: a folder is not there, no cell has such a field, or two cells would be one run.
  """
  _check_fields(cells, differ)
  runs: dict[str, list[tuple[Path, Any]]] = {}
  for path in _finished(folders):
    config = files.read_json(path / "config.json")
    runs.setdefault(_key(config, differ), []).append((path, config))
  claimed, taken = [], {}
  for cell in cells:
    path, config = cell.workdir, cell.config
    if (path / "config.json").is_file():
      config = files.read_json(path / "config.json")
    elif here := runs.get(_key(cell.config, differ)):
      path, config = min(here, key=lambda run: len(files.differences(run[1], cell.config)))
      if path in taken:
        raise ValueError(
          f"differ: {path} would be {taken[path]} and {cell.name}; name fewer fields"
        )
      taken[path] = cell.name
    changes = files.differences(config, cell.config)
    refused = [change for change in changes if change[0] not in differ]
    other = f"its workdir holds a run of another config: {_text(refused)}" if refused else ""
    noted = f"the run differs from the plan: {_text(changes)}" if changes and not refused else ""
    claimed.append(dataclasses.replace(cell, workdir=path, other=other, noted=noted))
  return claimed


def _finished(folders: Iterable[str]) -> list[Path]:
  """Workdirs of finished runs."""
  found: list[Path] = []
  for text in folders:
    folder = data.expand_path(text)
    if not folder.is_dir():
      raise ValueError(f"also: there is no folder {text}")
    here = sorted((*folder.glob("config.json"), *folder.glob("*/config.json")))
    found += [path.parent for path in here if (path.parent / "finished").exists()]
  return found


def _check_fields(cells: Sequence[Cell], differ: Collection[str]) -> None:
  known = dict.fromkeys(name for cell in cells for name in bases.names(cell.config))
  for name in differ:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=3)
      hint = f"; close ones: {', '.join(close)}" if close else ""
      raise ValueError(f"differ: {name!r} is no field of a cell{hint}")


def _key(config: Any, differ: Collection[str]) -> str:
  """A config without some fields, as a text."""
  config = copy.deepcopy(config)
  for name in differ:
    *sections, last = name.split(".")
    part = config
    for section in sections:
      part = part.get(section, {})
    part.pop(last, None)
  return json.dumps(config, sort_keys=True)


def _text(changes: Changes) -> str:
  """The first differences, and how many more there are."""
  shown = ", ".join(f"{name} was {old}, is now {new}" for name, old, new in changes[:3])
  return shown + (f", and {len(changes) - 3} more" if len(changes) > 3 else "")
