"""Pictures of serving: latency against request rate, a load over time, speed by ratio."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from flexiq_jax.runs.plots import drawing
from flexiq_jax.runs.plots.looks import COLOURS, MARKERS, looks


def latency_against_rate(
  path: str | os.PathLike[str],
  curves: Mapping[float, tuple[np.ndarray, np.ndarray, np.ndarray]],
  *,
  title: str,
  limit: float,
  capacity: float,
) -> Path:
  """Draws median and p90 over the request rate, a line for each ratio.

  Args:
    path: PNG file.
    curves: 4-bit ratio -> (rates [R], medians [R], p90 [R]), requests a second and seconds; inf
      where too few requests were answered.
    title: what was served.
    limit: of the p90, seconds.
    capacity: what INT8 sustains at most, requests a second.

  Raises:
    ValueError: there is nothing to draw.
  """
  if not curves:
    raise ValueError("curves: empty; expected at least one ratio")
  with matplotlib.rc_context(drawing.STYLE):
    figure = Figure(figsize=(9.0, 4.2), dpi=drawing.DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(curves)))
    for axes, part, name in zip(panels, (1, 2), ("median", "p90"), strict=True):
      for i, (ratio, curve) in enumerate(sorted(curves.items())):
        x, y = np.asarray(curve[0], float), 1e3 * np.asarray(curve[part], float)
        # Beyond what is sustained the latency is that of the full queue: lines leave the picture.
        y = np.minimum(y, 1e6 * limit)
        style = {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}
        axes.plot(x, y, **style, linewidth=1.6, label=f"{100 * ratio:g} %" if part == 1 else "_")
      axes.axvline(capacity, color=drawing.GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
      axes.axhline(1e3 * limit, color=drawing.GREY, linewidth=1, zorder=1)
      axes.set_yscale("log")
      axes.set_ylim(top=4e3 * limit)
      axes.set_xlabel("requests a second")
      axes.set_title(name)
      axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("latency (ms)")
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    text = "4-bit ratio; solid line: p90 limit; dotted line: what INT8 sustains at most"
    figure.legend(
      loc="outside lower center", ncols=len(curves), frameon=False, fontsize=9, title=text
    )
    return drawing.save(figure, path)


def load_over_time(
  path: str | os.PathLike[str],
  seconds: np.ndarray,
  arrivals: np.ndarray,
  panels: Mapping[str, Mapping[str, np.ndarray]],
  *,
  title: str,
  capacity: float,
  logarithmic: Sequence[str] = (),
) -> Path:
  """Draws the arrivals over time, and below them what each system made of them.

  Args:
    path: PNG file.
    seconds: `[B]`, moments.
    arrivals: `[B]`, requests a second.
    panels: axis label -> system -> values `[B]`, nan where there is none.
    title: what was served.
    capacity: what INT8 sustains at most, requests a second.
    logarithmic: labels of the panels with a logarithmic axis.

  Raises:
    ValueError: there is nothing to draw.
  """
  if not panels or not all(panels.values()):
    raise ValueError("panels: empty; expected at least one with one system")
  systems = dict.fromkeys(name for panel in panels.values() for name in panel)
  with matplotlib.rc_context(drawing.STYLE):
    height = 1.4 + 1.7 * (1 + len(panels))
    figure = Figure(figsize=(9.0, height), dpi=drawing.DPI, layout="constrained")
    rows = figure.subplots(1 + len(panels), 1, sharex=True)
    rows[0].plot(seconds, arrivals, color=drawing.GREY, linewidth=1.2)
    rows[0].axhline(capacity, color=drawing.GREY, linewidth=1, linestyle=(0, (2, 2)))
    rows[0].annotate(
      *("what INT8 sustains at most", (seconds[0], capacity)),
      **{"xytext": (2, 3), "textcoords": "offset points", "fontsize": 8, "color": drawing.GREY},
    )
    rows[0].set_ylabel("requests\na second")
    rows[0].set_title(title)
    shown = looks(systems)
    for axes, (label, panel) in zip(rows[1:], panels.items(), strict=True):
      for i, (system, values) in enumerate(panel.items()):
        look = shown[system]
        axes.plot(seconds, values, color=look.colour, linewidth=1.3, zorder=3 + 1 / (1 + i))
      axes.set_ylabel(label)
      if label in logarithmic:
        axes.set_yscale("log")
    rows[-1].set_xlabel("seconds")
    for axes in rows:
      axes.grid(axis="y", color="#dddddd", linewidth=0.6)
      axes.margins(x=0.01)
    lines = [
      matplotlib.lines.Line2D([], [], color=shown[s].colour, label=shown[s].name) for s in systems
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawing.save(figure, path)


def gain_against_ratio(
  path: str | os.PathLike[str],
  panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
  *,
  title: str,
) -> Path:
  """Draws how much faster than at 0 % models run, a panel for each, a line for each device.

  Args:
    path: PNG file.
    panels: model -> device -> (4-bit ratios [R], speeds over that of 0 % [R]).
    title: where the numbers are from.

  Raises:
    ValueError: there is nothing to draw.
  """
  if not panels or not all(panels.values()):
    raise ValueError("panels: empty; expected at least one model with one device")
  devices = list(dict.fromkeys(name for panel in panels.values() for name in panel))
  with matplotlib.rc_context(drawing.STYLE):
    across = min(3, math.ceil(math.sqrt(len(panels))))
    down = -(-len(panels) // across)
    figure = Figure(
      figsize=(1.2 + 2.9 * across, 1.2 + 2.5 * down), dpi=drawing.DPI, layout="constrained"
    )
    every = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in every[len(panels) :]:
      axes.set_visible(False)
    for axes, (model, panel) in zip(every, panels.items(), strict=False):
      for device, (ratios, gains) in panel.items():
        i = devices.index(device)
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(100 * np.asarray(ratios), gains, **style, markersize=4.5, linewidth=1.4)
      axes.set_title(model)
      axes.grid(axis="y", color="#dddddd", linewidth=0.6)
      axes.set_xlabel("4-bit ratio (%)")
      axes.tick_params(labelbottom=True)  # also where no panel is below
    for axes in every[::across]:
      axes.set_ylabel("speed over that of 0 %")
    lines = [
      matplotlib.lines.Line2D(
        *([], []), color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=name
      )
      for i, name in enumerate(devices)
    ]
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    figure.legend(
      handles=lines, loc="outside lower center", ncols=min(6, len(lines)), frameon=False
    )
    return drawing.save(figure, path)
