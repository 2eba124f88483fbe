"""The pictures of a report: accuracy against ratio, what goes 4-bit when, unused bits.

Every function draws arrays into a file and returns its path. Figures are made without pyplot, so
nothing is left in a global registry and no display is needed. Colours are the colour-blind safe
set of Okabe and Ito (https://jfly.uni-koeln.de/color/) and matplotlib's cividis and viridis;
methods also differ in their markers, so the pictures can be read in grey.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"

_STYLE = {
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.labelsize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlelocation": "left",
}
_DPI = 150


def accuracy_against_ratio(
  path: str | os.PathLike[str],
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  title: str,
  references: Mapping[str, float] | None = None,
  ylabel: str = "top-1 accuracy (%)",
) -> Path:
  """Draws one line per method, with fixed models as horizontal lines; both are labelled in place.

  Args:
    path: PNG file.
    curves: method -> (4-bit ratios [R] in 0..1, values [S, R] or [R], a seed a row). Several seeds
      are drawn as their mean within a band from the lowest to the highest; nan is no value.
    title: what was measured, with model, dataset and number of images.
    references: name -> value of the fixed models, as float, INT8 and INT4.
    ylabel: name and unit of the values.

  Returns:
    The path.

  Raises:
    ValueError: there is nothing to draw, or shapes disagree.
  """
  references = dict(references or {})
  if not curves and not references:
    raise ValueError("curves and references are both empty: give at least one of them")
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(7.5, 4.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    labels: list[tuple[float, str, str, float]] = []  # value, text, colour, x of the line's end
    dashes = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
    for i, (name, y) in enumerate(references.items()):
      style = dashes[i % len(dashes)]
      axes.axhline(y, color=GREY, linewidth=1, linestyle=style, zorder=1)
      labels.append((y, f"{name} {y:.2f}", GREY, 102.0))
    several = False
    for i, (method, (ratios, values)) in enumerate(curves.items()):
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
      colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
      if grid.shape[0] > 1:
        several = True
        low, high = np.nanmin(grid, axis=0), np.nanmax(grid, axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
      axes.plot(x, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, zorder=3)
      labels.append((float(mean[-1]), method, colour, float(x[-1])))
    if several:
      title += "\nlines: mean over seeds; bands: lowest to highest seed"
    axes.set_title(title)
    axes.set_xlabel("4-bit ratio (% of the MACs in selectable layers)")
    axes.set_ylabel(ylabel)
    axes.set_xlim(-2, 102)
    axes.set_xticks(range(0, 101, 25))
    axes.xaxis.set_minor_locator(MultipleLocator(5))
    axes.margins(y=0.08)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _label_ends(axes, labels)
    return _save(figure, path)


def layer_map(
  path: str | os.PathLike[str],
  names: Sequence[str],
  ratios: np.ndarray,
  share: np.ndarray,
  *,
  title: str,
  levels: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> Path:
  """Draws which layers go 4-bit at which ratio: a fine map, and the numbers at the main levels.

  Args:
    path: PNG file.
    names: the layers, in order from the input, L of them.
    ratios: 4-bit ratios [R] in 0..1, ascending, in fine and even steps.
    share: [L, R], share of the layer's channel groups that are 4-bit at the ratio, 0..1; nan in a
      layer that stays 8-bit.
    title: model and dataset.
    levels: ratios whose shares are written out; each takes the nearest column of `share`.

  Returns:
    The path.

  Raises:
    ValueError: shapes disagree.
  """
  ratios, share = np.asarray(ratios, float), np.asarray(share, float)
  _expect("share", share, (len(names), ratios.size))
  if ratios.size < 2 or (np.diff(ratios) <= 0).any():
    raise ValueError(f"ratios is {ratios!r}: expected at least two, ascending")
  rows = len(names)
  font, row_height = _row_font(rows)
  colours = matplotlib.colormaps["cividis"].with_extremes(bad="#e4e4e4")
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9.0, 1.5 + row_height * rows), dpi=_DPI, layout="constrained")
    fine, table = figure.subplots(
      1, 2, sharey=True, gridspec_kw={"width_ratios": (6, 0.72 * max(len(levels), 1))}
    )
    step = np.diff(ratios) / 2
    middle = ratios[:-1] + step
    edges = 100 * np.concatenate([[ratios[0]], middle, [ratios[-1]]])
    mesh = fine.pcolormesh(
      edges, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(share), cmap=colours, vmin=0, vmax=1
    )
    fine.set_xlabel("4-bit ratio (% of the MACs in selectable layers)")
    fine.set_xticks(range(0, 101, 25))
    fine.set_yticks(range(rows), names, fontsize=font)
    fine.set_ylim(rows - 0.5, -0.5)
    columns = [int(np.abs(ratios - level).argmin()) for level in levels]
    table.imshow(
      np.ma.masked_invalid(share[:, columns]), cmap=colours, vmin=0, vmax=1, aspect="auto"
    )
    for row in range(rows):
      if np.isnan(share[row]).all():
        table.text((len(levels) - 1) / 2, row, "8-bit", fontsize=font, ha="center", va="center")
        continue
      for column, source in enumerate(columns):
        value = share[row, source]
        table.text(
          column,
          row,
          f"{100 * value:.0f}",
          fontsize=font,
          ha="center",
          va="center",
          color="white" if value < 0.55 else "black",
        )
    for axes in (fine, table):
      axes.tick_params(length=0)
      axes.spines[:].set_visible(False)
      axes.hlines(np.arange(1, rows) - 0.5, *axes.get_xlim(), color="white", linewidth=0.6)
      # On a tall picture the lower ticks are out of sight from the upper rows.
      axes.tick_params(axis="x", labelsize=9, labeltop=rows > 30)
    table.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
    table.tick_params(axis="y", labelleft=False)
    table.set_xlabel("% of groups at the ratio")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    bar = figure.colorbar(
      mesh, ax=[fine, table], location="top", shrink=0.5, aspect=40, pad=0.01, anchor=(1.0, 0.0)
    )
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_label("share of the layer's channel groups in 4 bits", fontsize=9)
    bar.outline.set_visible(False)
    return _save(figure, path)


def unused_bits(
  path: str | os.PathLike[str],
  names: Sequence[str],
  activations: np.ndarray,
  weights: np.ndarray,
  *,
  title: str,
) -> Path:
  """Draws how many of the eight bits the channel groups of each layer leave unused.

  Args:
    path: PNG file.
    names: the layers, in order from the input, L of them.
    activations: [L, 5], share or number of the layer's groups with 0, 1, 2, 3 and 4 unused bits; a
      row of nan or zeros is a layer without data.
    weights: the same for weights.
    title: model and dataset.

  Returns:
    The path.

  Raises:
    ValueError: shapes disagree.
  """
  rows = len(names)
  font, row_height = _row_font(rows)
  colours = matplotlib.colormaps["viridis"](np.linspace(0.06, 0.94, 5))
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(9.0, 1.5 + row_height * rows), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    handles = []
    for axes, name, counts in zip(
      panels, ("activations", "weights"), (activations, weights), strict=True
    ):
      counts = np.nan_to_num(np.asarray(counts, float))
      _expect(name, counts, (rows, 5))
      total = counts.sum(axis=1, keepdims=True)
      widths = 100 * np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
      left = np.cumsum(widths, axis=1) - widths
      handles = [
        axes.barh(
          range(rows),
          widths[:, bits],
          left=left[:, bits],
          height=0.86,
          color=colours[bits],
          linewidth=0,
          label="4 and more" if bits == 4 else str(bits),
        )
        for bits in range(5)
      ]
      for row in np.flatnonzero(total[:, 0] == 0):
        axes.text(50, row, "no data", fontsize=font, ha="center", va="center", color=GREY)
      axes.set_title(name)
      axes.set_xlabel("share of channel groups (%)")
      axes.set_xlim(0, 100)
      axes.set_xticks(range(0, 101, 25))
      axes.tick_params(axis="x", labelsize=9)
      axes.tick_params(axis="y", length=0)
      axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(rows), names, fontsize=font)
    panels[0].set_ylim(rows - 0.5, -0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.legend(
      handles=handles,
      title="unused bits",
      loc="outside lower center",
      ncols=5,
      frameon=False,
      fontsize=9,
      title_fontsize=9,
    )
    return _save(figure, path)


def _row_font(rows: int) -> tuple[float, float]:
  """Font size in points and row height in inches, for few and for many layers."""
  return (9.0, 0.24) if rows <= 30 else (7.5, 0.165)


def _label_ends(axes: Axes, labels: list[tuple[float, str, str, float]]) -> None:
  """Writes the names right of the axes, moved apart, each with a thin line to its value."""
  low, high = axes.get_ylim()
  gap = (high - low) * 0.052
  labels = sorted(labels)
  places = spread([value for value, *_ in labels], gap, low + gap / 2, high - gap / 2)
  for place, (value, text, colour, end) in zip(places, labels, strict=True):
    axes.annotate(
      text,
      xy=(end, value),
      xytext=(106, place),
      color=colour,
      va="center",
      fontsize=9,
      annotation_clip=False,
      arrowprops={
        "arrowstyle": "-",
        "relpos": (0, 0.5),  # from the middle of the text's left edge
        "color": colour,
        "linewidth": 0.6,
        "shrinkA": 1,
        "shrinkB": 3,
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


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise ValueError(f"{name} has shape {array.shape}: expected {shape}")


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
  FigureCanvasAgg(figure)
  path = Path(path)
  figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
  return path
