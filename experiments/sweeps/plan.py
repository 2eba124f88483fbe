"""Cells of a sweep: every base with every value of the axes and every seed.

A base is a config file with fields set: `config`, `fields` ((field, value), ...), `labels`
((column, value), ...) for the table, and estimates: `minutes`, `memory` (GiB), `gpus`, `tasks`.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.shared import identity
from experiments.shared.checks import check, field, is_seed
from experiments.sweeps import bases, computed, needs
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps.cells import Cell, require_unique


def plan(config, folder: Path) -> list[Cell]:
  """All cells of a sweep, in order, with what each of them lacks.

  Args:
    config: of the sweep (see `configs.shared.sweeps`).
    folder: that the workdirs lie in.

  Raises:
    ValueError: a field of the sweep, or of a run, is wrong, or two cells have one name.
  """
  sweep = config.sweep
  axes = _axes(sweep)
  if not sweep.bases:
    raise ValueError("config.sweep.bases: empty; at least one base config is needed")
  with field("config.sweep.skip"):
    skip = _pattern(sweep.skip)
  cells = []
  for name, base in sweep.bases.items():
    with field(f"config.sweep.bases.{name}"):
      start = bases.with_fields(bases.load(base.config), dict(base.fields))
    for values in itertools.product(*axes.values()):
      chosen = dict(zip(axes, values, strict=True))
      label = "-".join([name, *(_part(axis, value) for axis, value in chosen.items())])
      if skip and skip.search(label):
        continue
      with field(f"config.sweep.axes ({label})"):
        run = bases.with_fields(start, chosen)
      with field(f"config.sweep, {label}"):
        check(run)
      cell = _cell(label, name, base, chosen, run, folder)
      with field(f"config.sweep.computed ({label})"):
        more = computed.columns(sweep.computed, run)
      cells.append(dataclasses.replace(cell, labels={**cell.labels, **more}))
  if not cells:
    raise ValueError(f"config.sweep.skip: {sweep.skip!r} leaves no cell")
  with field("config.sweep"):
    require_unique(cells)
  return cells


def _cell(name: str, base_name: str, base, chosen: Mapping[str, Any], run, folder: Path) -> Cell:
  workdir = folder / name
  return Cell(
    name=name,
    workdir=workdir,
    command=bases.command(base.config, {**dict(base.fields), **chosen}, workdir),
    folder=bases.ROOT,
    labels={"base": base_name, **dict(base.labels), **{k: _plain(v) for k, v in chosen.items()}},
    config=files.to_plain(identity.plain(run)),
    minutes=float(base.minutes),
    memory=float(base.memory),
    gpus=base.gpus,
    tasks=base.tasks,
    missing=needs.missing(run),
  )


def _axes(sweep) -> dict[str, tuple]:
  """Field -> values, the seed last."""
  axes = {}
  for axis in (*sweep.axes, ("seed", sweep.seeds)):
    if (
      not isinstance(axis, tuple | list) or len(axis) != 2 or not isinstance(axis[1], tuple | list)
    ):
      raise ValueError(f"config.sweep.axes: {axis!r}; (field, (value, ...)) is accepted")
    name, values = axis
    where = "seeds" if name == "seed" else "axes"
    if name in axes:
      raise ValueError(f"config.sweep.axes: {name!r} stands twice")
    if not values:
      raise ValueError(f"config.sweep.{where}: {name!r} has no values")
    axes[name] = tuple(values)
  for seed in sweep.seeds:
    if not is_seed(seed):
      raise ValueError(f"config.sweep.seeds: {seed!r} is not in 0..{2**31 - 1}")
  return axes


def _pattern(text: str) -> re.Pattern | None:
  try:
    return re.compile(text) if text else None
  except re.error as error:
    raise ValueError(f"{text!r} is no regular expression ({error})") from None


def _part(axis: str, value: Any) -> str:
  """An axis and its value in a cell's name."""
  return f"{axis.rpartition('.')[2]}{re.sub(r'[^A-Za-z0-9.]+', '_', str(value)).strip('_')}"


def _plain(value: Any) -> Any:
  """A value as a cell of a CSV holds it."""
  return value if isinstance(value, str | int | float) else " ".join(map(str, value)) or "none"
