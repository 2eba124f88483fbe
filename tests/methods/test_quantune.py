"""QuantuneV2's metrics by their laws, its ranking and its allocation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.methods import quantune

# A residual block: 0 -> 1 -> 2, and 3 adds 0 and 2.
INPUTS = [(), (0,), (1,), (0, 2)]


def rounded(a, bits):
  step = 2.0 / 2**bits
  return np.round(a / step) * step


def test_sqnr_of_numbers():
  a, q = np.array([3.0, 4.0]), np.array([3.0, 3.5])
  assert quantune.nmse(a, q) == 0.25 / 25
  assert quantune.sqnr(a, q) == pytest.approx(20)
  assert quantune.sqnr(10 * a, 10 * q) == pytest.approx(20)


def test_sqnr_of_extremes():
  zeros, ones = np.zeros(3), np.ones(3)
  assert quantune.sqnr(ones, ones) == quantune.sqnr(zeros, zeros) == math.inf
  assert quantune.sqnr(zeros, ones) == -math.inf
  assert quantune.sqnr(ones, zeros) == 0


def test_sqnr_grows_by_six_decibels_a_bit():
  a = np.random.default_rng(0).uniform(-1, 1, 200_000)
  ratios = [quantune.sqnr(a, rounded(a, bits)) for bits in range(3, 12)]
  np.testing.assert_allclose(np.diff(ratios), 20 * math.log10(2), atol=0.05)


def test_delta_is_the_loss_beyond_the_worst_input():
  delta = quantune.sqnr_delta([40.0, 30.0, 35.0, 20.0], INPUTS, source=50.0)
  np.testing.assert_allclose(delta, [10, 10, -5, 15])


def test_delta_of_exact_outputs_is_finite():
  delta = quantune.sqnr_delta([math.inf, math.inf, 30.0, -math.inf], INPUTS)
  np.testing.assert_allclose(delta, [0, 0, quantune.EXACT - 30, 30 + quantune.EXACT])


def test_delta_finds_the_coarse_node_of_a_chain():
  """Four nodes double what they get; each rounds, the third to few bits."""
  a = np.random.default_rng(1).uniform(-1, 1, 10_000)
  q, ratios = a, []
  for node in range(4):
    a, q = 2 * a, rounded(2 * q, 3 if node == 2 else 9)
    ratios.append(quantune.sqnr(a, q))
  delta = quantune.sqnr_delta(ratios, [(), (0,), (1,), (2,)])
  assert np.argmax(delta[1:]) == 1
  assert ratios[3] < ratios[0] - 20  # its own SQNR would blame the last one, too
  assert delta[3] < 1


def test_score_adds_both_metrics_at_one_scale():
  delta, errors = np.array([1.0, 2.0, 3.0]), np.exp([10.0, 10.0, 4.0])
  z = np.array([-1, 0, 1]) * 1.5**0.5
  np.testing.assert_allclose(quantune.score(delta, np.ones(3)), z)
  log = np.array([2, 2, -4]) / 8**0.5
  np.testing.assert_allclose(quantune.score(delta, errors), z + log)
  np.testing.assert_allclose(quantune.score(100 * delta, errors**2), z + log)
  np.testing.assert_array_equal(quantune.score(np.ones(3), np.zeros(3)), np.zeros(3))


@given(st.permutations(range(8)), st.integers(0, 1000))
def test_order_of_nodes_does_not_matter(order, seed):
  rng = np.random.default_rng(seed)
  names = np.array([f"node{i}" for i in range(8)])
  delta, errors = rng.integers(0, 3, 8) / 3, 10.0 ** rng.integers(-3, 0, 8)
  expected = quantune.rank(names.tolist(), quantune.score(delta, errors))
  order = list(order)
  scores = quantune.score(delta[order], errors[order])
  assert quantune.rank(names[order].tolist(), scores) == expected


def test_ranking_is_by_score_then_name():
  assert quantune.rank(("b", "a", "c"), np.array([1.0, 1.0, 2.0])) == ("c", "a", "b")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 40))
def test_allocation_is_the_longest_beginning_in_the_budget(costs, budget, more):
  names = tuple(f"node{i}" for i in range(len(costs)))
  extra = dict(zip(names, costs, strict=True))
  taken = quantune.allocate(names, extra, budget)
  assert taken == names[: len(taken)]
  assert sum(costs[: len(taken)]) <= budget
  assert len(taken) == len(names) or sum(costs[: len(taken) + 1]) > budget
  assert quantune.allocate(names, extra, budget + more)[: len(taken)] == taken


def test_allocation_counts_nodes_without_costs():
  assert quantune.allocate(("a", "b", "c"), None, 2) == ("a", "b")
  assert quantune.allocate(("a", "b", "c"), None, 9) == ("a", "b", "c")
  assert quantune.allocate(("a", "b", "c"), None, 0) == ()


def test_boundaries_are_edges_between_precisions():
  assert quantune.boundaries([True] * 4, INPUTS) == 0
  assert quantune.boundaries([False, True, False, False], INPUTS) == 2
  assert quantune.boundaries([True, False, True, False], INPUTS) == 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: quantune.nmse(np.ones(2), np.ones(3)), r"q: shape \(3,\); expected that of a"),
    (lambda: quantune.sqnr(np.ones(2), np.array([1, np.nan])), "a, q: not all finite"),
    (lambda: quantune.sqnr_delta([1.0], INPUTS), "inputs: of 4 nodes; expected 1"),
    (lambda: quantune.sqnr_delta([np.nan] * 4, INPUTS), "ratios: there are NaN"),
    (lambda: quantune.rank(("a", "a"), np.ones(2)), "names different"),
    (lambda: quantune.rank(("a", "b"), np.array([1, np.nan])), "a number for each"),
    (lambda: quantune.allocate(("a",), {"a": -1.0}, 1), "expected finite costs >= 0"),
    (lambda: quantune.allocate(("a",), None, math.nan), "budget: nan; expected at least 0"),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()
