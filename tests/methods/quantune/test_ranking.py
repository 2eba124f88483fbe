"""QuantuneV2's losses of nodes by their laws, its ranking and its allocation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.methods.quantune import ranking
from tests.methods.quantune.metrics_for_test import sqnr

# A residual block: 0 -> 1 -> 2, and 3 adds 0 and 2.
INPUTS = [(), (0,), (1,), (0, 2)]


def rounded(a, bits):
  step = 2.0 / 2**bits
  return np.round(a / step) * step


def test_delta_is_the_loss_beyond_the_worst_input():
  delta = ranking.sqnr_delta([40.0, 30.0, 35.0, 20.0], INPUTS, source=50.0)
  np.testing.assert_allclose(delta, [10, 10, -5, 15])


def test_delta_of_exact_outputs_is_finite():
  delta = ranking.sqnr_delta([math.inf, math.inf, 30.0, -math.inf], INPUTS)
  np.testing.assert_allclose(delta, [0, 0, ranking.EXACT - 30, 30 + ranking.EXACT])


def test_delta_finds_the_coarse_node_of_a_chain():
  """Four nodes double what they get; each rounds, the third to few bits."""
  a = np.random.default_rng(1).uniform(-1, 1, 10_000)
  q, ratios = a, []
  for node in range(4):
    a, q = 2 * a, rounded(2 * q, 3 if node == 2 else 9)
    ratios.append(sqnr(a, q))
  delta = ranking.sqnr_delta(ratios, [(), (0,), (1,), (2,)])
  assert np.argmax(delta[1:]) == 1
  assert ratios[3] < ratios[0] - 20  # its own SQNR would blame the last one, too
  assert delta[3] < 1


def test_score_adds_both_metrics_at_one_scale():
  delta, errors = np.array([1.0, 2.0, 3.0]), np.exp([10.0, 10.0, 4.0])
  z = np.array([-1, 0, 1]) * 1.5**0.5
  np.testing.assert_allclose(ranking.score(delta, np.ones(3)), z)
  log = np.array([2, 2, -4]) / 8**0.5
  np.testing.assert_allclose(ranking.score(delta, errors), z + log)
  np.testing.assert_allclose(ranking.score(100 * delta, errors**2), z + log)
  np.testing.assert_array_equal(ranking.score(np.ones(3), np.zeros(3)), np.zeros(3))


@given(st.permutations(range(8)), st.integers(0, 1000))
def test_order_of_nodes_does_not_matter(order, seed):
  rng = np.random.default_rng(seed)
  names = np.array([f"node{i}" for i in range(8)])
  delta, errors = rng.integers(0, 3, 8) / 3, 10.0 ** rng.integers(-3, 0, 8)
  expected = ranking.rank(names.tolist(), ranking.score(delta, errors))
  order = list(order)
  scores = ranking.score(delta[order], errors[order])
  assert ranking.rank(names[order].tolist(), scores) == expected


def test_ranking_is_by_score_then_name():
  assert ranking.rank(("b", "a", "c"), np.array([1.0, 1.0, 2.0])) == ("c", "a", "b")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 40))
def test_allocation_is_the_longest_beginning_in_the_budget(costs, budget, more):
  names = tuple(f"node{i}" for i in range(len(costs)))
  extra = dict(zip(names, costs, strict=True))
  taken = ranking.allocate(names, extra, budget)
  assert taken == names[: len(taken)]
  assert sum(costs[: len(taken)]) <= budget
  assert len(taken) == len(names) or sum(costs[: len(taken) + 1]) > budget
  assert ranking.allocate(names, extra, budget + more)[: len(taken)] == taken


def test_allocation_counts_nodes_without_costs():
  assert ranking.allocate(("a", "b", "c"), None, 2) == ("a", "b")
  assert ranking.allocate(("a", "b", "c"), None, 9) == ("a", "b", "c")
  assert ranking.allocate(("a", "b", "c"), None, 0) == ()


def test_boundaries_are_edges_between_precisions():
  assert ranking.boundaries([True] * 4, INPUTS) == 0
  assert ranking.boundaries([False, True, False, False], INPUTS) == 2
  assert ranking.boundaries([True, False, True, False], INPUTS) == 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ranking.sqnr_delta([1.0], INPUTS), "inputs: of 4 nodes; expected 1"),
    (lambda: ranking.sqnr_delta([np.nan] * 4, INPUTS), "ratios: there are NaN"),
    (lambda: ranking.rank(("a", "a"), np.ones(2)), "names different"),
    (lambda: ranking.rank(("a", "b"), np.array([1, np.nan])), "a number for each"),
    (lambda: ranking.allocate(("a",), {"a": -1.0}, 1), "expected finite costs >= 0"),
    (lambda: ranking.allocate(("a",), None, math.nan), "budget: nan; expected at least 0"),
  ],
)
def test_refuses(call, message):
  with pytest.raises(ValueError, match=message):
    call()
