"""The report of a comparison, over one run or several that differ in their seeds."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.tables import Table, tables_of
from experiments.shared import reporting, setup
from flexiq_jax import evaluation
from flexiq_jax.graph import Layer
from flexiq_jax.methods import Details, Shown
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.task import sizes
from flexiq_jax.runs import files, plots, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir

_COLUMNS = (  # column, heading, decimals
  ("avg_bits", "average bits", 2),
  ("top1", "top-1 (%)", 2),
  ("drop_float", "drop from float", 2),
  ("relative", "relative (%)", 2),
  ("bitops", "BitOPs (G)", 2),
  ("size", "size (MB)", 3),
  ("seconds", "selection (s)", 0),
  ("forwards", "forwards", 0),
  ("steps", "training steps", 0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Runs:
  """What is reported.

  Attributes:
    workdirs: one for each run.
    rows: of all of them; that of the float model, which is the same in all, once.
    folder: for pictures.
    title: heading of pictures.
    layers: of the model.
    names: layers that may be lowered.
  """

  workdirs: Sequence[Workdir]
  rows: list[dict[str, Any]]
  folder: Path
  title: str
  layers: tuple[Layer, ...]
  names: tuple[str, ...]

  def of(self, table: Table) -> list[dict[str, Any]]:
    """The rows of a table, under the plain names of methods."""
    return [
      {**row, "method": row["method"].rpartition("/")[2]}
      for row in self.rows
      if row.get("table") == table.name
    ]

  @property
  def float_row(self) -> dict[str, Any]:
    """The row of the float model."""
    return next(row for row in self.rows if row["method"] == "float")


def collect(
  inputs: setup.Inputs,
  workdirs: Sequence[Workdir],
  workdir: Workdir,
  command: str,
  seconds: float,
) -> Path:
  """Draws the pictures and writes `report.md`; returns its path.

  Args:
    inputs: from `prepare`.
    workdirs: of the runs.
    workdir: where the report goes; one of them, or another.
    command: the command line.
    seconds: what this start took.
  """
  config = inputs.config
  title = f"Comparison, {reporting.title(config).removeprefix('FlexiQ: ')}"
  rows = {(row["method"], row["ratio"], row["seed"]): row for one in workdirs for row in one.rows()}
  runs = _Runs(
    workdirs=workdirs,
    rows=[*rows.values()],
    folder=workdir.path,
    title=title,
    layers=inputs.layers,
    names=tuple(layer.name for layer in inputs.layers if layer.name in inputs.selectable),
  )
  parts, pictures, notes, last = [], [], [], []
  for table in tables_of(config):
    parts.append((f"{table.name}: {table.title}", _table(runs, table)))
    pictures += _pictures(runs, table)
    if text := _differences(runs, table):
      parts.append((f"{table.name}: differences", text))
    details = _details(runs, table)
    front = "" if table.name == "main" else f"{table.name}: "
    last += [(f"{front}{heading}", text) for one in details for heading, text in one.parts]
    pictures += [
      (f"{caption}, {table.title}", path) for one in details for caption, path in one.pictures
    ]
    notes += [note for one in details for note in one.notes]
  path = report.write(
    workdir.path,
    title=title,
    summary={
      "model": config.model,
      "evaluation images": inputs.evaluated,
      "calibration images": config.calibration.images,
      "sensitivity images": config.comparison.images or config.calibration.images,
      "seeds": len(workdirs),
      "wall time": duration(seconds),
    },
    rows=[runs.float_row],
    layers=reporting.layer_rows(inputs.layers, inputs.groups),
    plots=pictures,
    notes=[
      "Mean ± standard deviation over seeds. Average bits are the MAC-weighted mean over the "
      "layers that may be lowered, where floating point counts as 32 bits. An asterisk: more than "
      "0.05 away from the budget (5 points of a share in 8 bits), because single layers are larger "
      "than that, or the method sees no gain in more bits.",
      "Forwards: passes over the calibration images that a selection took; calibration itself, "
      "which all methods share, is not counted; a backward pass counts as two. CLADO's variants "
      "share one measurement, of pairs. Training steps serve all budgets of a method.",
      *(
        ["Weights are random: the figures show that the pipeline runs, no accuracy."]
        if config.weights == "random"
        else []
      ),
      *notes,
    ],
    command=command,
    sections=[*parts, *last],
  )
  report.print_results(runs.rows, title=f"comparison, {reporting.title(config)}")
  return path


def _table(runs: _Runs, table: Table) -> str:
  joined = tables.aggregate(runs.of(table))
  joined.sort(key=lambda row: table.budget(row["ratio"]))  # stable: methods keep their order
  budget_name = "budget" if table.unit == "average bits" else table.unit
  header = ["method", budget_name, *(c[1] for c in _COLUMNS)]
  cells = [
    [
      row["method"],
      _shown(table, table.budget(row["ratio"])) + (" *" if row.get("missed") else ""),
      *(tables.mean_spread(row.get(n), row.get(f"{n}_spread"), d) for n, _, d in _COLUMNS),
    ]
    for row in joined
  ]
  return tables.markdown_table(header, cells)


def _shown(table: Table, budget: float) -> str:
  """A budget as text."""
  return f"{budget:g}" if table.unit == "average bits" else tables.percent(budget, 1)


def _details(runs: _Runs, table: Table) -> list[Details]:
  """What methods show of themselves, each family once."""
  shown = Shown(
    task=table,
    table=table.name,
    title=f"{runs.title}\n{table.title}",
    names=runs.names,
    budget=lambda budget: _shown(table, budget),
    seeds=[*dict.fromkeys(row["seed"] for row in runs.rows if row["seed"] is not None)],
    workdirs=runs.workdirs,
    folder=runs.folder,
  )
  families = {method.family or name: method for name, method in table.methods.items()}
  return [method.report(shown) for method in families.values()]


def _pictures(runs: _Runs, table: Table) -> list[tuple[str, Path]]:
  """(caption, path) of a table's pictures."""
  own = runs.of(table)
  if not own:
    return []
  heading = f"{runs.title}\n{table.title}"
  unit, factor = {
    "average bits": ("average bits", 1),
    "size": ("size (% of 8-bit weights)", 100),
    "share in 8 bits": ("MACs in 8 bits (%)", 100),
  }[table.unit]
  spent = [{**row, "spent": factor * _spent(runs, table, row)} for row in own]
  curves = {
    method: (np.nanmean(tables.curves(spent, "spent")[method][1], axis=0), top1)
    for method, (_, top1) in tables.curves(own).items()
  }
  path = plots.accuracy_against_budget(
    runs.folder / f"{table.name}.png",
    curves,
    title=heading,
    xlabel=f"{unit}, of the plans",
    references={"float": runs.float_row["top1"]},
  )
  drawn = [(f"Top-1 over what the plans really have, {table.title}", path)]
  path = runs.workdirs[0].path / table.name / "plans.json"
  if path.is_file():
    labels = [f"{budget:g}" for budget in table.budgets]
    bits = {
      method: np.array([[of.get(b, {}).get(n, np.nan) for b in labels] for n in runs.names])
      for method, of in files.read_json(path).items()
    }
    xlabel = "budget: " + {"size": "size over that of 8-bit weights"}.get(table.unit, table.unit)
    path = plots.bits_over_budgets(
      runs.folder / f"{table.name}_bits.png", runs.names, labels, bits, title=heading, xlabel=xlabel
    )
    drawn.append((f"Bits of each layer over the budget, first seed, {table.title}", path))
  return drawn


def _spent(runs: _Runs, table: Table, row: Mapping[str, Any]) -> float:
  """What a row's plan has of what its budget limits, in the budget's unit."""
  if table.unit == "average bits":
    return row["avg_bits"]
  if table.unit == "share in 8 bits":
    return (FLOAT - row["avg_bits"]) / (FLOAT - 8)
  kept, eight = (
    sizes(runs.layers, dict.fromkeys(runs.names, bits), None, table.kept)["size"] for bits in (0, 8)
  )
  return (row["size"] - kept) / (eight - kept)


def _differences(runs: _Runs, table: Table) -> str:
  """Methods beside those that they name, and all beside random plans, on the same images."""
  pairs = [(name, other) for name, method in table.methods.items() for other in method.beside]
  pairs += [(name, "random") for name, method in table.methods.items() if not method.reference]
  cells = []
  for a, b in pairs:
    if not {a, b} <= {*table.methods}:
      continue
    for budget in table.budgets:
      found = []
      for workdir in runs.workdirs:
        folder = workdir.path / table.name / "correct"
        paths = [folder / f"{m}_{table.ratio(budget):.6f}.npy" for m in (a, b)]
        if all(path.is_file() for path in paths):
          found.append([np.load(path) for path in paths])
      if not found:
        continue
      means = ", ".join(f"{evaluation.paired_difference([pair])[0]:+.2f}" for pair in found)
      spread = tables.mean_spread(*evaluation.paired_difference(found))
      cells.append([f"{a} - {b}", _shown(table, budget), spread, means])
  if not cells:
    return ""
  note = "Points of top-1 on the same images: mean over seeds ± standard error over images."
  header = ["difference", "budget", "points", "of each seed"]
  return f"{note}\n\n{tables.markdown_table(header, cells)}"
