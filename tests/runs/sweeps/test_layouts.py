"""Tables of collected rows: means over seeds, reasons in place of numbers, Markdown and LaTeX."""

import numpy as np
import pytest

from flexiq_jax.runs.sweeps import collect, layouts
from flexiq_jax.runs.sweeps.layouts import Layout

DONE = {"status": "finished", "reason": None}
ROWS = [
  {
    "cell": "a0",
    **DONE,
    "base": "a_b",
    "seed": 0,
    "method": "float",
    "top1": 91.0,
    "images": 10000,
  },
  {"cell": "a0", **DONE, "base": "a_b", "seed": 0, "method": "gram", "ratio": 0.5, "top1": 90.0},
  {
    "cell": "a1",
    **DONE,
    "base": "a_b",
    "seed": 1,
    "method": "float",
    "top1": 91.0,
    "images": 10000,
  },
  {"cell": "a1", **DONE, "base": "a_b", "seed": 1, "method": "gram", "ratio": 0.5, "top1": 88.0},
  {"cell": "b0", "status": "missing", "reason": "weights not here: hf:x/y_z", "base": "b"},
]
COLUMNS = (
  ("images", "method=float", "images"),
  ("float", "method=float"),
  ("50 %", "method=gram,ratio=0.50"),
  ("75 %", "method=gram,ratio=0.75"),
)
LAYOUT = Layout(title="model", rows=(("A", "base=a_b"), ("B", "base=b")), columns=COLUMNS)


def test_means_spreads_and_reasons():
  header, body = layouts.cells(LAYOUT, ROWS)
  assert header == ["model", "images", "float", "50 %", "75 %"]
  spread = np.std([90.0, 88.0], ddof=1)
  assert body[0] == ["A", "10,000", "91.00 ± 0.00", f"89.00 ± {spread:.2f}", "—"]
  assert body[1] == ["B", "missing: weights not here: hf:x/y_z", "—", "—", "—"]


def test_markdown_and_latex():
  assert layouts.markdown(LAYOUT, ROWS).splitlines()[2] == (
    "| A | 10,000 | 91.00 ± 0.00 | 89.00 ± 1.41 | — |"
  )
  assert layouts.latex(LAYOUT, ROWS).splitlines() == [
    r"\begin{tabular}{lrrrr}",
    r"\toprule",
    r"model & images & float & 50 \% & 75 \% \\",
    r"\midrule",
    r"A & 10,000 & 91.00 $\pm$ 0.00 & 89.00 $\pm$ 1.41 & -- \\",
    r"B & missing: weights not here: hf:x/y\_z & -- & -- & -- \\",
    r"\bottomrule",
    r"\end{tabular}",
  ]


def test_rows_named_by_a_column():
  layout = Layout(title="base", rows="base", columns=COLUMNS[1:2], spread=False, digits=1)
  assert layouts.cells(layout, ROWS)[1] == [
    ["a_b", "91.0"],
    ["b", ROWS[-1]["status"] + ": " + ROWS[-1]["reason"]],
  ]


def test_conditions():
  index = layouts.Index(ROWS)
  assert index.find("") == ROWS
  assert index.find("ratio=") == [row for row in ROWS if row.get("ratio") is None]
  assert index.find("seed=1,method=gram") == [ROWS[3]]
  assert index.find("nothing=1") == []
  with pytest.raises(ValueError, match="condition 'method': 'method' is not column=value"):
    index.find("method")


def test_rows_come_back_from_a_file(tmp_path):
  text = collect.to_csv(ROWS)
  (tmp_path / "rows.csv").write_text(text)
  found = collect.read_csv(tmp_path / "rows.csv")
  strip = lambda rows: [{k: v for k, v in row.items() if v is not None} for row in rows]
  assert strip(found) == strip(ROWS)
  assert collect.to_csv(found) == text
  assert collect.unfinished(found) == {"b0": "missing: weights not here: hf:x/y_z"}
  (tmp_path / "other.csv").write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="has no column 'cell': collect it anew"):
    collect.read_csv(tmp_path / "other.csv")
