"""Numbers as text, tables, and rows joined over seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.runs import tables


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (640, "640"),
    (999, "999"),
    (999.4, "999"),
    (999.5, "1.00 k"),
    (1000, "1.00 k"),
    (9994, "9.99 k"),
    (9996, "10.0 k"),
    (442_368, "442 k"),
    (999_499, "999 k"),
    (999_500, "1.00 M"),
    (41_300_000, "41.3 M"),
    (4_600_000_000, "4.60 G"),
    (0.5, "0.50"),
    (None, "—"),
  ],
)
def test_si(value, text):
  assert tables.si(value) == text


def test_si_with_a_unit():
  assert tables.si(1_500, "B") == "1.50 kB"
  assert tables.si(12, "B") == "12 B"


@given(st.floats(1e-3, 1e17))
def test_si_is_right_to_three_digits(value):
  text, _, prefix = tables.si(value).partition(" ")
  scale = 1000.0 ** ["", "k", "M", "G", "T", "P"].index(prefix)
  assert float(text) * scale == pytest.approx(value, rel=5.1e-3, abs=5.1e-3)


def test_number():
  assert tables.number(1.005) == "1.00"
  assert tables.number(-0.001) == "0.00"
  assert tables.number(-0.01) == "-0.01"
  assert tables.number(np.float32(0.25)) == "0.25"
  assert tables.number(8) == "8"
  assert tables.number(float("nan")) == tables.number(None) == "—"


def test_mean_spread():
  assert tables.mean_spread(91.8, 0.125, 1) == "91.8 ± 0.1"
  assert tables.mean_spread(91.8, None) == "91.80"
  assert tables.mean_spread(None, None) == "—"


ROWS = [
  {"method": "random", "ratio": 0.5, "seed": 0, "top1": 90.0, "device": "cpu"},
  {"method": "greedy", "ratio": 0.5, "seed": 0, "top1": 91.0},
  {"method": "random", "ratio": 0.25, "seed": 0, "top1": 91.0},
  {"method": "random", "ratio": 0.5, "seed": 1, "top1": 92.0},
  {"method": "random", "ratio": 0.1 + 0.2, "seed": 1, "top1": None},
  {"method": "random", "ratio": None, "seed": None, "top1": 95.0},
]


def test_aggregate_joins_seeds_in_order():
  joined = tables.aggregate(ROWS)
  assert [(r["method"], r["ratio"], r["seeds"]) for r in joined] == [
    ("random", None, 1),
    ("random", 0.25, 1),
    ("random", 0.3, 1),
    ("random", 0.5, 2),
    ("greedy", 0.5, 1),
  ]
  assert joined[3]["top1"] == 91.0
  assert joined[3]["top1_spread"] == pytest.approx(2**0.5)
  assert joined[3]["device"] is None
  assert joined[1]["top1_spread"] is None
  assert joined[2]["top1"] is None


def test_curves_leave_gaps_as_nan():
  curves = tables.curves(ROWS)
  assert list(curves) == ["random", "greedy"]
  ratios, values = curves["random"]
  np.testing.assert_array_equal(ratios, [0.25, 0.5])
  np.testing.assert_array_equal(values, [[91.0, 90.0], [np.nan, 92.0]])


def test_text_table_lines_up():
  text = tables.text_table(
    ("name", "MACs"), [("stem", "1.00 M"), ("a/b/c", "12 k"), ("total", "9")], totals=True
  )
  assert text.split("\n") == [
    "name     MACs",
    "-----  ------",
    "stem   1.00 M",
    "a/b/c    12 k",
    "-----  ------",
    "total       9",
  ]


def test_markdown_table_escapes():
  text = tables.markdown_table(("a", "b|c"), [("x\ny", "_z_ w_v *q*")])
  assert text.split("\n") == [
    r"| a | b\|c |",
    "| :-- | --: |",
    r"| x y | \_z\_ w_v \*q\* |",
  ]


@pytest.mark.parametrize("table", [tables.text_table, tables.markdown_table])
def test_ragged_rows_are_refused(table):
  with pytest.raises(ValueError, match=r"row \['x'\] has 1 cells: the header has 2"):
    table(("a", "b"), [("x",)])
