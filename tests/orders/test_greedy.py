"""Greedy and random orders, and the scores they take."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.orders import Space, exact_scores, greedy, random, range_scores


@settings(deadline=None)
@given(st.data())
def test_greedy_takes_the_smallest_error_per_mac_again_and_again(data):
  sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
  macs = data.draw(st.integers(1, 50))
  space = Space.create(["a", "b"], [sizes, [3, 4]], [macs, 7])
  errors = data.draw(st.lists(st.integers(0, 20), min_size=space.total, max_size=space.total))
  order = greedy(space, np.array(errors, float))
  per_mac = [Fraction(e, int(c)) for e, c in zip(errors, space.cost, strict=True)]
  left = list(range(space.total))
  for group in order:
    best = min(left, key=lambda i: (per_mac[i], i))  # ties in flat order
    assert group == best
    left.remove(group)
  assert not left


def test_greedy_by_hand():
  space = Space.create(["a", "b"], [[1, 1], [2]], [10, 10])  # costs 1 1 2
  np.testing.assert_array_equal(greedy(space, np.array([3.0, 1.0, 4.0])), [1, 2, 0])
  np.testing.assert_array_equal(greedy(space, np.array([2.0, 2.0, 4.0])), [0, 1, 2])  # ties


@pytest.mark.parametrize(
  ("scores", "message"),
  [
    ([1.0, 2.0], r"scores: shape \(2,\), expected \(3,\)"),
    ([1.0, np.nan, np.inf], "scores: 2 of them are not finite"),
  ],
)
def test_greedy_refuses(scores, message):
  space = Space.create(["a"], [[1, 1, 1]], [1])
  with pytest.raises(ValueError, match=message):
    greedy(space, np.array(scores))


def test_random_is_a_permutation_that_the_seed_decides():
  space = Space.create(["a"], [[1] * 50], [1])
  orders = [random(space, seed) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(orders[0], orders[1])
  assert not np.array_equal(orders[0], orders[2])
  np.testing.assert_array_equal(np.sort(orders[2]), np.arange(50))


def test_exact_scores_are_relative_to_the_layers_energy():
  space = Space.create(["a", "b"], [[1, 1], [1]], [1, 1])
  errors = {"b": (np.array([3.0]), 6.0), "a": (np.array([1.0, 2.0]), 4.0)}
  np.testing.assert_allclose(exact_scores(space, errors), [0.25, 0.5, 0.5])
  errors["a"] = (np.zeros(2), 0.0)  # a dead layer costs nothing, and divides by nothing
  np.testing.assert_allclose(exact_scores(space, errors), [0, 0, 0.5])


@dataclasses.dataclass
class _Groups:
  """What `range_scores` reads."""

  channels: tuple
  x_shift: np.ndarray
  w_shift: np.ndarray
  x_power: np.ndarray
  w_power: np.ndarray
  w_step: np.ndarray


def test_range_scores_predict_the_error_of_rounding():
  """Against rounding itself, on operands that spread over the codes as the formula assumes."""
  rng = np.random.default_rng(0)
  rows, members, outputs = 4000, (3, 2), 40
  shifts = ((2, 3), (0, 1))  # (activation, weight) of each group
  space = Space.create(["a"], [members], [1])
  x = rng.integers(-100, 101, (rows, 5)).astype(float)
  w = rng.integers(-100, 101, (5, outputs)).astype(float)
  step = 0.01
  groups, errors, energy = [], [], 0.0
  for g, (n, (e_x, e_w)) in enumerate(zip(members, shifts, strict=True)):
    channels = np.arange(3) if g == 0 else np.arange(3, 5)
    xg, wg = x[:, channels], w[channels] * step
    low_x = np.rint(xg / 2**e_x) * 2**e_x
    low_w = np.rint(wg / step / 2**e_w) * 2**e_w * step
    errors.append(np.square(xg @ wg - low_x @ low_w).sum() / rows)
    energy += np.square(xg @ wg).sum() / rows
    groups.append((n, np.square(xg).mean(axis=0).sum(), np.square(wg).sum()))
  made = _Groups(
    channels=(np.arange(3), np.arange(3, 5)),
    x_shift=np.array([e for e, _ in shifts]),
    w_shift=np.array([e for _, e in shifts]),
    x_power=np.array([g[1] for g in groups]),
    w_power=np.array([g[2] for g in groups]),
    w_step=np.array([n * outputs * step**2 for n in members]),
  )
  predicted = range_scores(space, {"a": made})
  np.testing.assert_allclose(predicted, np.array(errors) / energy, rtol=0.2)
  made.x_shift, made.w_shift = np.zeros(2, int), np.zeros(2, int)
  np.testing.assert_array_equal(range_scores(space, {"a": made}), [0, 0])  # lossless
  made.w_shift = np.array([[0, 2], [1, 1]])  # per output: the mean over outputs counts
  by_output = range_scores(space, {"a": made})
  noise = np.array([(0 + 1.5) / 2, 0.5])  # (4^e + 2) / 12
  errors = made.x_power * noise * made.w_step / [3, 2]
  np.testing.assert_allclose(by_output[0] / by_output[1], errors[0] / errors[1])
