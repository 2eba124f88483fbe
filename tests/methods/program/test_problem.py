"""Choices and problems: what they mean, and what they refuse."""

import numpy as np
import pytest

from flexiq_jax.methods.program import Choices, Problem, Solution

NAMES = ("stem", "body", "skip")
COSTS = {"size": [(20, 40, 80), (4, 8, 16), (2, 4, 8)], "time": [(1, 2, 3)] * 3}


def choices_of(bits=(2, 4, 8), costs=COSTS, **kwargs):
  return Choices.create(NAMES, bits, costs, **kwargs)


def test_options_lie_side_by_side():
  choices = choices_of()
  assert choices.total == 9
  np.testing.assert_array_equal(choices.layer, [0, 0, 0, 1, 1, 1, 2, 2, 2])
  x = choices.pick({"skip": 8, "stem": 2, "body": 4})
  np.testing.assert_array_equal(np.flatnonzero(x), [0, 4, 8])
  assert choices.costs["size"] @ x == 20 + 8 + 8


def test_value_is_the_sum_over_the_options_taken():
  g = np.arange(81.0).reshape(9, 9)
  g = g + g.T
  bits = {"stem": 2, "body": 4, "skip": 8}
  expected = sum(g[a, b] for a in (0, 4, 8) for b in (0, 4, 8))
  assert Problem(choices=choices_of(), objective=g).value(bits) == expected
  linear = Problem(choices=choices_of(), objective=np.arange(9.0) ** 2)
  assert linear.value(bits) == 0 + 16 + 64


def test_tied_layers_decide_together():
  bits = [(2, 4, 8), (8, 4), (2, 8, 4)]
  costs = {"size": [(1, 2, 4), (4, 2), (1, 4, 2)]}
  choices = choices_of(bits, costs, tied=[("skip", "body")])
  assert choices.groups() == [((0,), (2, 4, 8)), ((1, 2), (8, 4))]
  assert choices.uniform(min) == {"stem": 2, "body": 4, "skip": 4}
  assert choices.uniform(max) == {"stem": 8, "body": 8, "skip": 8}


def test_gap_is_relative_and_zero_where_both_are():
  def plan(objective, bound):
    return Solution(bits={}, objective=objective, bound=bound, costs={}, seconds=0, solver="milp")

  assert plan(2.0, 1.0).gap == 0.5
  assert plan(1.0, -3.0).gap == pytest.approx(4 / 3)
  assert plan(0.0, 0.0).gap == 0
  assert plan(0.0, 0.0).optimal
  assert not plan(2.0, 1.0).optimal
  assert not plan(2.0, None).optimal


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"bits": [(2, 4, 8)] * 2}, r"costs\['size'\]: \[3, 3, 3\] values per layer"),
    ({"bits": [(2, 4, 8)] * 2, "costs": {}}, "bits: of 2 layers; expected 3"),
    ({"bits": (2, 4, 4)}, r"bits: \(2, 4, 4\) for layer stem"),
    ({"bits": (0, 4, 8)}, "expected different whole numbers >= 1"),
    ({"bits": [(2, 4, 8), (), (8,)], "costs": {}}, r"bits: \(\) for layer body"),
    ({"costs": {"size": [(1, 2), (1, 2), (1, 2)]}}, r"costs\['size'\]: \[2, 2, 2\] values"),
    ({"costs": {"size": [(1, 2, np.nan)] * 3}}, r"costs\['size'\]: 3 numbers are not finite"),
    ({"tied": [("stem", "head")]}, "no layer 'head'"),
    ({"tied": [("stem", "skip"), ("body", "skip")]}, "expected each layer once at most"),
    (
      {"bits": [(2,), (4, 8), (4,)], "costs": {}, "tied": [("stem", "skip")]},
      r"tied: layers \['stem', ",
    ),
  ],
)
def test_choices_that_do_not_fit_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    choices_of(**kwargs)


def test_names_that_repeat_are_refused():
  with pytest.raises(ValueError, match=r"names: .*all different"):
    Choices.create(("a", "a"), (4, 8), {})
  with pytest.raises(ValueError, match=r"names: .*at least one"):
    Choices.create((), (4, 8), {})


@pytest.mark.parametrize(
  ("bits", "message"),
  [
    ({"stem": 2, "body": 4}, "bits: of layers"),
    ({"stem": 2, "body": 4, "skip": 16}, r"bits: 16 for layer skip, which has \(2, 4, 8\)"),
  ],
)
def test_bits_outside_the_options_are_refused(bits, message):
  with pytest.raises(ValueError, match=message):
    choices_of().pick(bits)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"objective": np.zeros(8)}, r"objective: shape \(8,\), expected \(9,\)"),
    ({"objective": np.zeros((9, 8))}, r"objective: shape \(9, 8\), expected \(9, 9\)"),
    ({"objective": np.full(9, np.nan)}, "objective: 9 numbers are not finite"),
    ({"objective": np.triu(np.ones((9, 9)))}, "differs from its transpose by 1"),
    ({"limits": {"energy": 3}}, r"limits: no cost 'energy'; there are \('size', 'time'\)"),
    ({"limits": {"size": np.nan}}, "limits: nan for size"),
  ],
)
def test_problems_that_do_not_fit_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Problem(choices=choices_of(), **{"objective": np.zeros(9), **kwargs})
