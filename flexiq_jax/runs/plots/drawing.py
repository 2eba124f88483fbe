"""Type sizes, lines and files of all pictures."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GREY = "#555555"
FAINT = "#bbbbbb"  # of what is no data: lines to labels

STYLE = {
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.labelsize": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlelocation": "left",
  "pdf.fonttype": 42,  # letters stay letters
}
DPI = 150


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
  """Writes the figure as PNG and, beside it, as PDF, the same bytes every time.

  Returns:
    The path of the PNG file.
  """
  FigureCanvasAgg(figure)
  # Otherwise it is laid out four times: for the frame and for the drawing of each file.
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  path = Path(path)
  frame = {"bbox_inches": "tight", "pad_inches": 0.12}
  figure.savefig(path, metadata={"Software": None}, **frame)
  figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **frame)
  return path
