"""The tables and pictures of a sweep, as its config lays them out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared.checks import field
from flexiq_jax.runs import plots, tables
from flexiq_jax.runs.sweeps import conditions
from flexiq_jax.runs.sweeps import layouts as laid
from flexiq_jax.runs.sweeps.layouts import Layout

Rows = Sequence[Mapping[str, Any]]


def layouts(config) -> dict[str, Layout]:
  """Name -> layout of a config's tables.

  Raises:
    ValueError: a layout is wrong; names it.
  """
  found = {}
  for name, part in config.tables.items():
    with field(f"config.tables.{name}"):
      found[name] = Layout(**part)
      for _, condition, *more in found[name].columns:
        for one in "|".join([condition, *more[1:]]).split("|"):
          conditions.parts(one)
  return found


def markdown(found: Mapping[str, Layout], rows: Rows, folder: Path) -> list[str]:
  """The tables as parts of a report, each with its picture where it has curves."""
  parts = []
  for name, layout in found.items():
    parts += [f"## {name}", laid.markdown(layout, rows)]
    if layout.spread and len({row.get("seed") for row in rows}) > 1:
      parts.append("A ± B: mean and sample standard deviation over seeds.")
    if curves := _curves(layout, rows):
      path = folder / f"{name}.png"
      plots.accuracy_against_ratio(path, curves, title=name, ylabel=layout.value)
      parts.append(f"![{name}]({path.name})")
  return parts


def latex(found: Mapping[str, Layout], rows: Rows) -> str:
  """All tables as LaTeX, with their names as comments."""
  return (
    "\n\n".join(f"% {name}\n{laid.latex(layout, rows)}" for name, layout in found.items()) + "\n"
  )


def _curves(layout: Layout, rows: Rows):
  """Values over the ratio, a curve for each row of the table."""
  points, index = [], conditions.Index(rows)
  for name, condition in laid.heads(layout, rows):
    own = conditions.Index(index.find(condition))
    for _, of_column, *more in layout.columns:
      if "ratio=" in of_column and not more:
        points += [{**row, "method": name} for row in own.find(of_column)]
  curves = tables.curves(points, layout.value)
  return {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
