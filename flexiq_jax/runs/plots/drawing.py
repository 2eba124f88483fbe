"""Colours, type sizes and files of all pictures."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"

STYLE = {
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.labelsize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlelocation": "left",
}
DPI = 150


def look(i: int) -> tuple[str, str]:
  """Colour and marker of the i-th method of a picture."""
  return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
  """Writes the figure as a PNG file, the same bytes every time, and returns the path."""
  FigureCanvasAgg(figure)
  path = Path(path)
  figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
  return path
