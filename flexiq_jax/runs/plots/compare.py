"""Pictures of layer-wise methods: accuracy against a budget, interactions of layers, their bits."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from flexiq_jax.runs.plots import drawing
from flexiq_jax.runs.plots.looks import looks


def accuracy_against_budget(
  path: str | os.PathLike[str],
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  title: str,
  xlabel: str,
  references: Mapping[str, float] | None = None,
) -> Path:
  """Draws a line for each method: the mean over seeds, with the lowest and highest as bars.

  Args:
    path: PNG file.
    curves: method -> (what each budget's plan spends `[R]`, top-1 `[S, R]`, a seed a row; nan is no
      value).
    title: what was measured.
    xlabel: what is spent.
    references: name -> top-1 of fixed models, as float.

  Raises:
    ValueError: there is nothing to draw, or shapes disagree.
  """
  if not curves:
    raise ValueError("curves: empty; expected at least one method")
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(figsize=(8.0, 4.6), dpi=drawing.DPI, layout="constrained")
    axes = figure.add_subplot()
    for name, y in (references or {}).items():
      axes.axhline(y, color=drawing.GREY, linewidth=1, zorder=1, label=f"{name} {y:.2f}")
    for method, look in looks(curves).items():
      x, values = (np.asarray(part, float) for part in curves[method])
      values = np.atleast_2d(values)
      if x.ndim != 1 or values.shape[1:] != x.shape or np.isnan(values).all(axis=0).any():
        raise ValueError(f"curves[{method!r}]: budgets {x.shape}, values {values.shape}")
      rising = np.argsort(x, kind="stable")
      x, values = x[rising], values[:, rising]
      mean = np.nanmean(values, axis=0)
      spread = np.stack([mean - np.nanmin(values, axis=0), np.nanmax(values, axis=0) - mean])
      axes.errorbar(
        *(x, mean),
        yerr=spread if len(values) > 1 else None,
        **{"color": look.colour, "marker": look.marker, "label": look.name},
        **{"markersize": 5, "linewidth": 1.5, "elinewidth": 0.8, "zorder": 3},
      )
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return drawing.save(figure, path)


def cross_layer_matrix(
  path: str | os.PathLike[str],
  names: Sequence[str],
  bits: Sequence[int],
  g: np.ndarray,
  *,
  title: str,
) -> Path:
  """Draws CLADO's matrix; layers from the input on, the widths of a layer side by side.

  Values differ by orders of magnitude, so colours follow the root of the absolute value.

  Args:
    path: PNG file.
    names: the I layers.
    bits: their B widths.
    g: float `[I B, I B]`.
    title: model and data.

  Raises:
    ValueError: shapes disagree.
  """
  count, widths = len(names), len(bits)
  if np.shape(g) != (count * widths,) * 2:
    raise ValueError(f"g has shape {np.shape(g)}: expected {(count * widths,) * 2}")
  signed = np.sign(g) * np.sqrt(np.abs(g))
  most = float(np.abs(signed).max()) or 1.0
  with matplotlib.rc_context(drawing.STYLE):
    size = float(np.clip(0.26 * count + 2.5, 5, 16))
    figure = Figure(figsize=(size + 1, size), dpi=drawing.DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(signed, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    middle = np.arange(count) * widths + (widths - 1) / 2
    font = 8.0 if count <= 30 else 6.0
    axes.set_xticks(middle, names, rotation=90, fontsize=font)
    axes.set_yticks(middle, names, fontsize=font)
    edges = np.arange(1, count) * widths - 0.5
    axes.hlines(edges, -0.5, count * widths - 0.5, color="white", linewidth=0.4)
    axes.vlines(edges, -0.5, count * widths - 0.5, color="white", linewidth=0.4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}\n{', '.join(map(str, bits))} bits in each layer")
    bar = figure.colorbar(image, ax=axes, shrink=0.6)
    bar.set_label("sign(G) sqrt(|G|); red: the loss grows", fontsize=9)
    return drawing.save(figure, path)


def bits_over_budgets(
  path: str | os.PathLike[str],
  names: Sequence[str],
  budgets: Sequence[str],
  plans: Mapping[str, np.ndarray],
  *,
  title: str,
  xlabel: str,
) -> Path:
  """Draws which bits each layer gets, a panel for each method and a column for each budget.

  More than 8 bits, which stand for floating point, are white.

  Args:
    path: PNG file.
    names: the I layers, from the input on.
    budgets: R labels, ascending.
    plans: method -> bits `[I, R]`; nan is no value.
    title: model and data.
    xlabel: what a budget is.

  Raises:
    ValueError: there is nothing to draw, or shapes disagree.
  """
  if not plans:
    raise ValueError("plans: empty; expected at least one method")
  for method, bits in plans.items():
    if np.shape(bits) != (len(names), len(budgets)):
      expected = (len(names), len(budgets))
      raise ValueError(f"plans[{method!r}] has shape {np.shape(bits)}: expected {expected}")
  rows = len(names)
  font, height = (9.0, 0.24) if rows <= 30 else (6.5, 0.15)
  colours = matplotlib.colormaps["cividis"].with_extremes(over="white")
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(
      figsize=(2.0 + len(plans) * (0.6 + 0.34 * len(budgets)), 1.6 + height * rows),
      dpi=drawing.DPI,
      layout="constrained",
    )
    panels = np.atleast_1d(figure.subplots(1, len(plans), sharey=True))
    names_of = looks(plans)
    for axes, (method, bits) in zip(panels, plans.items(), strict=True):
      bits = np.asarray(bits, float)
      axes.imshow(np.ma.masked_invalid(bits), cmap=colours, vmin=2, vmax=8, aspect="auto")
      for row, column in zip(*np.nonzero(~np.isnan(bits)), strict=True):
        value = bits[row, column]
        colour = "white" if value < 5 else "black"
        axes.text(column, row, f"{value:g}", fontsize=font, ha="center", va="center", color=colour)
      axes.set_title(names_of[method].name, fontsize=9)
      axes.set_xticks(range(len(budgets)), budgets, fontsize=8)
      axes.set_yticks(range(rows), names, fontsize=font)
      axes.tick_params(length=0)
      axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.supxlabel(xlabel, fontsize=10)
    return drawing.save(figure, path)
