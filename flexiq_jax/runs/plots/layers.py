"""A row for each layer: what goes 4-bit when, unused bits."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from flexiq_jax.runs.plots import drawing


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
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(figsize=(9.0, 1.5 + row_height * rows), dpi=drawing.DPI, layout="constrained")
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
    return drawing.save(figure, path)


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
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(figsize=(9.0, 1.5 + row_height * rows), dpi=drawing.DPI, layout="constrained")
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
        axes.text(50, row, "no data", fontsize=font, ha="center", va="center", color=drawing.GREY)
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
    return drawing.save(figure, path)


def _row_font(rows: int) -> tuple[float, float]:
  """Font size in points and row height in inches, for few and for many layers."""
  return (9.0, 0.24) if rows <= 30 else (7.5, 0.165)


def _expect(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise ValueError(f"{name} has shape {array.shape}: expected {shape}")
