"""Accuracy against ratio."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from flexiq_jax.runs.plots import drawing
from flexiq_jax.runs.plots.looks import looks


def accuracy_against_ratio(
  path: str | os.PathLike[str],
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  title: str,
  references: Mapping[str, float] | None = None,
  error: tuple[str, float] | None = None,
  ylabel: str = "top-1 accuracy (%)",
) -> Path:
  """Draws one line per method, with fixed models as horizontal lines that are labelled in place.

  Args:
    path: PNG file.
    curves: method -> (4-bit ratios [R] in 0..1, values [S, R] or [R], a seed a row). Several seeds
      are drawn as their mean within a band from the lowest to the highest; nan is no value.
    title: what was measured, with model, dataset and number of images.
    references: name -> value of the fixed models, as float, INT8 and INT4.
    error: name of a reference and its standard error, drawn as a grey band.
    ylabel: name and unit of the values.

  Returns:
    The path.

  Raises:
    ValueError: there is nothing to draw, or shapes disagree.
  """
  references = dict(references or {})
  if not curves and not references:
    raise ValueError("curves and references are both empty: give at least one of them")
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(figsize=(7.5, 4.8), dpi=drawing.DPI, layout="constrained")
    axes = figure.add_subplot()
    dashes = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
    for i, y in enumerate(references.values()):
      style = dashes[i % len(dashes)]
      axes.axhline(y, color=drawing.GREY, linewidth=1, linestyle=style, zorder=1)
    if error:
      name, half = error
      low, high = references[name] - half, references[name] + half
      label = f"{name} ± 1 standard error"
      axes.axhspan(low, high, color=drawing.FAINT, alpha=0.35, linewidth=0, zorder=0, label=label)
    several = False
    for i, (method, look) in enumerate(looks(curves).items()):
      ratios, values = curves[method]
      x, grid = 100 * np.asarray(ratios, float), np.atleast_2d(np.asarray(values, float))
      if x.ndim != 1 or grid.ndim != 2 or grid.shape[1] != x.size or np.isnan(grid).all():
        raise ValueError(
          f"curves[{method!r}] has ratios {x.shape} and values {grid.shape}: expected [R] and "
          "[S, R] with R >= 1 and a value in it"
        )
      keep = np.argsort(x, kind="stable")
      keep = keep[~np.isnan(grid[:, keep]).all(axis=0)]
      x, grid = x[keep], grid[:, keep]
      mean = np.nanmean(grid, axis=0)
      if grid.shape[0] > 1:
        several = True
        low, high = np.nanmin(grid, axis=0), np.nanmax(grid, axis=0)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0, zorder=1)
      axes.plot(
        *(x, mean),
        **{"color": look.colour, "marker": look.marker, "label": look.name},
        **{"markersize": 5, "linewidth": 1.8},
        zorder=3 - i / len(curves),  # the first one, which the picture is about, above all others
      )
    if several:
      title += "\nlines: mean over seeds; coloured bands: lowest to highest seed"
    axes.set_title(title)
    axes.set_xlabel("4-bit ratio (% of the MACs in selectable layers)")
    axes.set_ylabel(ylabel)
    axes.set_xlim(-2, 102)
    axes.set_xticks(range(0, 101, 25))
    axes.xaxis.set_minor_locator(MultipleLocator(5))
    axes.margins(y=0.08)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _label_references(axes, references)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawing.save(figure, path)


def _label_references(axes: Axes, references: Mapping[str, float]) -> None:
  """Writes the names right of the axes, moved apart; a faint line leads to one that was moved."""
  low, high = axes.get_ylim()
  gap = (high - low) * 0.052
  labels = sorted((value, f"{name} {value:.2f}") for name, value in references.items())
  places = spread([value for value, _ in labels], gap, low + gap / 2, high - gap / 2)
  for place, (value, text) in zip(places, labels, strict=True):
    axes.annotate(
      text,
      xy=(102, value),
      xytext=(105, place),
      color=drawing.GREY,
      va="center",
      fontsize=9,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "relpos": (0, 0.5),  # from the middle of the text's left edge
        "color": drawing.FAINT,
        "linewidth": 0.5,
        "shrinkA": 1,
        "shrinkB": 0,
      },
    )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Moves ascending positions apart, as little as needed (pool adjacent violators).

  Args:
    values: wanted positions, ascending.
    gap: least distance of neighbours.
    low: least position; gives way where there are too many values for the room.
    high: greatest position.

  Returns:
    Positions, ascending, `gap` apart or more.
  """
  # With i * gap taken off, "gap apart" is "not descending": least squares under that is isotonic
  # regression, by merging neighbours that are out of order into blocks of equal value.
  blocks: list[tuple[float, int]] = []  # mean, size
  for i, value in enumerate(values):
    mean, size = value - i * gap, 1
    while blocks and blocks[-1][0] > mean:
      other, count = blocks.pop()
      mean, size = (mean * size + other * count) / (size + count), size + count
    blocks.append((mean, size))
  top = max(high - gap * (len(values) - 1), low)
  flat = [min(max(mean, low), top) for mean, size in blocks for _ in range(size)]
  return [base + i * gap for i, base in enumerate(flat)]
