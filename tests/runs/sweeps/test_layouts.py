"""Tables of collected rows: means over seeds, reasons in place of numbers, Markdown and LaTeX."""

import numpy as np
import pytest

from flexiq_jax.runs.sweeps import collect, conditions, layouts
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
  index = conditions.Index(ROWS)
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


def run(cell, training, seed=0, **methods):
  """Rows of a finished run: method, or method and ratio as `own_1`, with its top-1."""
  front = {"cell": cell, **DONE, "network": "a", "training": training, "seed": seed}
  found = []
  for name, top1 in methods.items():
    method, _, ratio = name.partition("_")
    found.append({**front, "method": method, **({"ratio": float(ratio)} if ratio else {})})
    found[-1]["top1"] = top1
  return found


def waits(training, seed=0, status="waiting", reason=None, network="a"):
  return {
    **{"cell": f"{network}-{training}-{seed}", "status": status, "reason": reason},
    **{"network": network, "training": training, "seed": seed},
  }


WAYS = Layout(
  title="model",
  rows=(("A", "network=a"), ("B", "network=b")),
  columns=(
    ("float", "training=x,method=float|training=y,method=float"),
    ("own", "training=y,method=own,ratio=1"),
    ("drop", "training=x,method=float|training=y,method=float", "top1", "training=y,method=own"),
  ),
  average="average",
  given=(("paper", (("drop", "0.6"),)),),
)


def test_the_first_condition_that_finds_rows_counts():
  rows = [*run("a-x-0", "x", float=90.0), *run("a-y-0", "y", float=10.0, own_1=88.5)]
  assert layouts.cells(WAYS, rows)[1][0] == ["A", "90.00", "88.50", "1.50"]
  rows = [waits("x"), *run("a-y-0", "y", float=80.0, own_1=81.0)]
  assert layouts.cells(WAYS, rows)[1][0] == ["A", "80.00", "81.00", "-1.00"]


def test_cells_of_runs_without_rows_say_why():
  rows = [*run("a-x-0", "x", float=90.0), waits("y")]
  assert layouts.cells(WAYS, rows)[1][0] == ["A", "90.00", "not run", "not run"]
  failed = waits("y", status="failed", reason="error: disk")
  assert layouts.cells(WAYS, [*rows[:1], failed])[1][0][2:] == ["failed", "failed"]
  missing = [waits(w, status="missing", reason="no weights", network="b") for w in "xy"]
  assert layouts.cells(WAYS, [*rows, *missing])[1][1] == ["B", "missing: no weights", "—", "—"]
  assert layouts.cells(WAYS, rows[:1])[1][0] == ["A", "90.00", "—", "—"]  # no run would have it


def test_what_is_known_of_a_run_needs_no_run():
  columns = (("own", "method=own"), ("rows", "method=float", "rows"))
  layout = Layout(title="model", rows=WAYS.rows[:1], columns=columns)
  assert layouts.cells(layout, [{**waits("y"), "rows": 3.5}])[1] == [["A", "not run", "3.50"]]
  done = [{**row, "rows": 4.5} for row in run("a-y-0", "y", float=90.0, own_1=88.0)]
  assert layouts.cells(layout, done)[1] == [["A", "88.00", "4.50"]]


def test_numbers_of_runs_that_differ_are_marked():
  rows = [*run("a-x-0", "x", float=90.0), *run("a-y-0", "y", own_1=88.0)]
  rows[1]["reason"] = "made on a Monday"
  assert layouts.cells(WAYS, rows)[1][0] == ["A", "90.00", "88.00*", "2.00*"]
  assert layouts.markdown(WAYS, rows).endswith("|\n\n`*`: a-y-0: made on a Monday.")
  assert not layouts.markdown(WAYS, rows[:1]).endswith(".")


@pytest.mark.parametrize(
  ("count", "named"), [(6, "a0, a1, a2, a3, a4, a5"), (500, "a0, a1, a2, a3, a4, a5 and 494 more")]
)
def test_many_marked_runs_are_counted(count, named):
  rows = [row for seed in range(count) for row in run(f"a{seed}", "x", seed, float=90.0)]
  rows = [{**row, "reason": "made on a Monday"} for row in rows]
  assert layouts.markdown(WAYS, rows).endswith(f"|\n\n`*`: {named}: made on a Monday.")


def test_a_mean_says_of_how_many_runs_it_is():
  rows = [*run("a-y-0", "y", float=90.0, own_1=88.0), *run("a-y-1", "y", 1, float=92.0, own_1=89.0)]
  whole = ["A", "91.00 ± 1.41", "88.50 ± 0.71", "2.50 ± 0.71"]  # the drop seed by seed
  assert layouts.cells(WAYS, rows)[1][0] == whole
  alone = run("a-y-2", "y", 2, float=60.0)  # its other value is not there
  assert layouts.cells(WAYS, [*rows, *alone])[1][0][3] == whole[3]
  line = layouts.cells(WAYS, [*rows, waits("y", 2)])[1][0]
  assert line == [whole[0], *(f"{cell} (2 of 3)" for cell in whole[1:])]


def test_averages_are_of_the_rows_that_have_a_value():
  rows = run("a-y-0", "y", float=90.0, own_1=88.0)
  rows += [{**row, "network": "b", "cell": "b", "top1": row["top1"] - 10} for row in rows[:1]]
  header, body = layouts.cells(WAYS, rows)
  assert header == ["model", "float", "own", "drop"]
  assert body[2] == ["average", "85.00", "88.00 (1 of 2)", "2.00 (1 of 2)"]
  assert body[3] == ["paper", "—", "—", "0.6"]
