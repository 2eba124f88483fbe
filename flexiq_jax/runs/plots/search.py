"""Progress of searches: best fitness against cost and against time."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from flexiq_jax.runs.plots import drawing

_COSTS = {"forwards": "forward passes over the search images", "seconds": "seconds"}


def search_progress(
  path: str | os.PathLike[str],
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str,
  references: Mapping[float | None, float] | None = None,
  ylabel: str = "squared logit error to the 8-bit model, mean per image",
) -> Path:
  """Draws the best fitness so far, a column for each level and a row for each kind of cost.

  A line starts where every seed of its method has a value and ends with the last seed; a seed that
  ended earlier keeps its last value. Marks stand at its start and end.

  Args:
    path: PNG file.
    rows: what `search.steps` returns; read are `method`, `ratio` (None where all
      levels are scored at once), `seed`, `forwards`, `seconds` and `best`.
    title: model, dataset and number of search images.
    references: level (None: all at once) -> fitness of the greedy order, a dashed line. Levels
      without rows are not drawn.
    ylabel: name and unit of the fitness.

  Returns:
    The path.

  Raises:
    ValueError: there are no rows.
  """
  if not rows:
    raise ValueError("rows is empty: a picture of a search needs one step of one method at least")
  references = {_level(ratio): value for ratio, value in (references or {}).items()}
  methods = list(dict.fromkeys(row["method"] for row in rows))
  levels = sorted({_level(row["ratio"]) for row in rows}, key=lambda r: (r is None, r or 0))
  with matplotlib.rc_context(drawing.STYLE):
    width = 6.4 if len(levels) == 1 else 0.7 + 3.3 * len(levels)
    figure = Figure(figsize=(width, 6.0), dpi=drawing.DPI, layout="constrained")
    panels = figure.subplots(2, len(levels), squeeze=False)
    for column, level in zip(panels.T, levels, strict=True):
      here = [row for row in rows if _level(row["ratio"]) == level]
      name = "all levels at once" if level is None else f"4-bit ratio {100 * level:g} %"
      column[0].set_title(name, fontsize=10)
      for axes, cost in zip(column, _COSTS, strict=True):
        for i, method in enumerate(methods):
          _draw(axes, [row for row in here if row["method"] == method], cost, *drawing.look(i))
        axes.set_xlabel(_COSTS[cost], fontsize=9)
        _scale(axes, "x", [row[cost] for row in here], 2)
        values = [row["best"] for row in here]
        if level in references:
          values.append(references[level])
          axes.axhline(references[level], color=drawing.GREY, linewidth=1, linestyle="--", zorder=1)
        _scale(axes, "y", values, 1)
        axes.tick_params(labelsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.supylabel(ylabel, fontsize=10)
    if len({(row["method"], row["seed"]) for row in rows}) > len(methods):
      title += "\nthick: mean over seeds; thin: single seeds"
    if len(levels) > 1:
      title += "\ncost since the search began, earlier levels included"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = []
    for i, method in enumerate(methods):
      colour, marker = drawing.look(i)
      handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, label=method))
    if not references.keys().isdisjoint(levels):
      handles.append(
        Line2D([], [], color=drawing.GREY, linewidth=1, linestyle="--", label="greedy, no search")
      )
    figure.legend(
      handles=handles,
      loc="outside lower center",
      ncols=max(1, int(width / (0.7 + 0.08 * max(len(str(h.get_label())) for h in handles)))),
      frameon=False,
      fontsize=9,
    )
    return drawing.save(figure, path)


def _level(ratio: float | None) -> float | None:
  return None if ratio is None else round(float(ratio), 6)


def _draw(
  axes: Axes, rows: Sequence[Mapping[str, Any]], cost: str, colour: str, marker: str
) -> None:
  """Draws one method: each seed thin where there are several, their mean thick."""
  curves = []
  for seed in dict.fromkeys(row["seed"] for row in rows):
    x, y = np.array([(row[cost], row["best"]) for row in rows if row["seed"] == seed], float).T
    keep = np.argsort(x, kind="stable")
    curves.append((x[keep], y[keep]))
  if not curves:
    return
  if len(curves) > 1:
    for x, y in curves:
      axes.plot(x, y, color=colour, drawstyle="steps-post", linewidth=0.7, alpha=0.45, zorder=2)
  x, y = _mean(curves)
  axes.plot(
    x,
    y,
    color=colour,
    drawstyle="steps-post",
    linewidth=1.8,
    marker=marker,
    markersize=5,
    markevery=[0, x.size - 1],
    zorder=3,
  )


def _mean(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Mean of step functions, each given by ascending places and the values from there on."""
  places = np.unique(np.concatenate([x for x, _ in curves]))
  places = places[places >= max(x[0] for x, _ in curves)]
  values = [y[np.searchsorted(x, places, side="right") - 1] for x, y in curves]
  return places, np.mean(values, axis=0)


def _scale(axes: Axes, name: str, values: Sequence[float], decades: int) -> None:
  """Makes the axis `x` or `y` logarithmic where its values are positive and span the decades."""
  axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
  low, high = min(values), max(values)
  if low > 0 and high >= low * 10**decades:
    axes.set(**{f"{name}scale": "log"})
    if high < low * 100:
      axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
  else:
    axis.set_major_locator(MaxNLocator(4 if name == "x" else 5, steps=(1, 2, 2.5, 5, 10)))
    if name == "x" or high >= 1000:
      axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    else:  # as many digits at each tick, a power of ten above the axis where they are many
      axes.ticklabel_format(axis="y", useOffset=False)
