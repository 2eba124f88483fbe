"""What searches reached, beside the order that they started from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from flexiq_jax.runs.plots import drawing
from flexiq_jax.runs.plots.looks import looks


def search_result(
  path: str | os.PathLike[str],
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str,
  references: Mapping[float | None, float] | None = None,
  ylabel: str = "squared logit error to the 8-bit model, mean per image",
) -> Path:
  """Draws the best fitness of each level as bars, a bar for each method, with what it cost.

  Several seeds are drawn as the bar of their mean, with a point each.

  Args:
    path: PNG file.
    rows: what `search.steps` returns; read are `method`, `ratio` (None where all
      levels are scored at once), `seed`, `forwards`, `seconds` and `best`.
    title: model, dataset and number of search images.
    references: level (None: all at once) -> fitness of the greedy order. Levels without rows are
      not drawn.
    ylabel: name and unit of the fitness.

  Returns:
    The path.

  Raises:
    ValueError: there are no rows.
  """
  if not rows:
    raise ValueError("rows is empty: a picture of a search needs one step of one method at least")
  reached: dict[tuple[str, float | None], dict[Any, float]] = {}
  costs: dict[str, dict[Any, tuple[float, float]]] = {}
  for row in rows:
    seeds = reached.setdefault((row["method"], _level(row["ratio"])), {})
    seeds[row["seed"]] = min(row["best"], seeds.get(row["seed"], np.inf))
    most = costs.setdefault(row["method"], {}).get(row["seed"], (0.0, 0.0))
    costs[row["method"]][row["seed"]] = (
      max(most[0], row["forwards"]),
      max(most[1], row["seconds"]),
    )
  levels = sorted({level for _, level in reached}, key=lambda r: (r is None, r or 0))
  greedy = {_level(ratio): value for ratio, value in (references or {}).items()}
  greedy = {level: value for level, value in greedy.items() if level in levels}
  for level, value in greedy.items():
    reached["greedy", level] = {None: value}
  methods = [*(["greedy"] if greedy else []), *costs]
  with matplotlib.rc_context(drawing.STYLE):
    width = 0.8 / len(methods)
    figure = Figure(
      figsize=(max(5.5, 1.6 + 0.8 * len(levels) * len(methods)), 4.4),
      dpi=drawing.DPI,
      layout="constrained",
    )
    axes = figure.add_subplot()
    for i, (method, look) in enumerate(looks(methods).items()):
      label = look.name
      if method in costs:
        forwards, seconds = np.mean([*costs[method].values()], axis=0)
        label += f": {forwards:,.0f} forward passes, {seconds:,.0f} s"
      for column, level in enumerate(levels):
        if (method, level) not in reached:
          continue
        values = [*reached[method, level].values()]
        mean, x = float(np.mean(values)), column + (i + 0.5) * width - 0.4
        axes.bar(x, mean, 0.92 * width, color=look.colour, label=label)
        label = "_"  # in the legend once
        if len(values) > 1:
          axes.plot([x] * len(values), values, ".", color=drawing.GREY, markersize=5)
        text = f"{mean:.3g}"
        if method != "greedy" and greedy.get(level, 0) > 0:
          text += f"\n{100 * (mean / greedy[level] - 1):+.0f} %"
        axes.annotate(
          text,
          (x, max(values)),
          xytext=(0, 3),
          textcoords="offset points",
          ha="center",
          fontsize=9,
        )
    names = ["all levels at once" if r is None else f"{100 * r:g} %" for r in levels]
    axes.set_xticks(range(len(levels)), names)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.margins(y=0.16)
    axes.set_xlabel("4-bit ratio")
    axes.set_ylabel(ylabel, fontsize=9)
    if any(len(values) > 1 for values in reached.values()):
      title += "\nbars: mean over seeds; points: single seeds"
    axes.set_title(title)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return drawing.save(figure, path)


def _level(ratio: float | None) -> float | None:
  return None if ratio is None else round(float(ratio), 6)
