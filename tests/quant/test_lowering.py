"""4-bit codes inside 8-bit codes: every code and every shift against Python's exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.quant import lowering

SHIFTS = range(lowering.MAX_SHIFT + 1)


def all_codes(signed):
  return np.arange(-128, 128) if signed else np.arange(256)


def lowered_exactly(q, e, signed, half_even):
  """One code by exact rational arithmetic: the 4-bit code."""
  exact = Fraction(int(q), 2**e)
  code = round(exact) if half_even else math.floor(exact + Fraction(1, 2))
  lo, hi = (-8, 7) if signed else (0, 15)
  return min(max(code, lo), hi)


def tops(signed):
  """Every magnitude that a group's largest code can have."""
  return range(128) if signed else range(256)


def lower(q, e, signed, half_even):
  """Values of lowered codes, in 8-bit steps."""
  if half_even:
    return np.asarray(lowering.lower_weights(q, e)) << e
  return np.asarray(lowering.lower_activations(q, e, signed)) << e


CASES = [
  pytest.param(True, True, id="weights"),
  pytest.param(True, False, id="signed activations"),
  pytest.param(False, False, id="unsigned activations"),
]


def test_bitlen():
  r = np.arange(256)
  np.testing.assert_array_equal(lowering.bitlen(r), [int(v).bit_length() for v in r])
  assert lowering.bitlen(r.reshape(4, 64)).shape == (4, 64)
  assert int(lowering.bitlen(5)) == 3


def test_shift_table():
  signed = [0] * 8 + [1] * 8 + [2] * 16 + [3] * 32 + [4] * 64
  unsigned = [0] * 16 + [1] * 16 + [2] * 32 + [3] * 64 + [4] * 128
  np.testing.assert_array_equal(lowering.range_shift(np.arange(128)), signed)
  np.testing.assert_array_equal(lowering.range_shift(np.arange(256), signed=False), unsigned)
  np.testing.assert_array_equal(lowering.unused_bits(np.arange(128)), 4 - np.array(signed))
  assert int(lowering.unused_bits(255, signed=False)) == 0


@pytest.mark.parametrize("e", SHIFTS)
def test_weights_round_half_to_even(e):
  q = all_codes(True)
  want = [lowered_exactly(v, e, True, half_even=True) for v in q]
  np.testing.assert_array_equal(lowering.lower_weights(q, e), want)
  of_numpy = lowering.lower_weights(q, np.asarray(e))
  assert isinstance(of_numpy, np.ndarray) and of_numpy.dtype == np.int32
  np.testing.assert_array_equal(of_numpy, want)


@pytest.mark.parametrize("e", SHIFTS)
@pytest.mark.parametrize("signed", [True, False])
def test_activations_round_half_up(signed, e):
  q = all_codes(signed)
  want = [lowered_exactly(v, e, signed, half_even=False) for v in q]
  np.testing.assert_array_equal(lowering.lower_activations(q, e, signed), want)


def test_shifts_broadcast_over_codes():
  q = np.arange(-128, 128).reshape(2, 128)
  e = np.array([[1], [3]])
  for i in (0, 1):
    np.testing.assert_array_equal(
      lowering.lower_weights(q, e)[i], lowering.lower_weights(q[i], int(e[i, 0]))
    )
    np.testing.assert_array_equal(
      lowering.lower_activations(q, e)[i], lowering.lower_activations(q[i], int(e[i, 0]))
    )


@pytest.mark.parametrize(("signed", "half_even"), CASES)
def test_tables_are_what_the_functions_compute_and_fit_int8(signed, half_even):
  q = all_codes(signed)
  values = lowering.lowered_values(signed, half_even)
  errors = lowering.squared_errors(signed, half_even)
  assert values.shape == errors.shape == (5, 256)
  for e in SHIFTS:
    np.testing.assert_array_equal(values[e], lower(q, e, signed, half_even))
    np.testing.assert_array_equal(errors[e], (q - values[e]) ** 2)
  # On the 8-bit grid, so that one int8 contraction computes a mixed layer.
  assert (values.min(), values.max()) == ((-128, 112) if signed else (0, 240))


@pytest.mark.parametrize(("signed", "half_even"), CASES)
def test_small_ranges_are_lossless(signed, half_even):
  q, values = all_codes(signed), lowering.lowered_values(signed, half_even)
  shifts = np.asarray(lowering.range_shift(np.arange(128), signed))
  for r in range(8 if signed else 16):
    within = np.abs(q) <= r
    np.testing.assert_array_equal(values[shifts[r]][within], q[within])
  r = 8 if signed else 16  # one more, and it is not
  within = np.abs(q) <= r
  assert np.any(values[shifts[r]][within] != q[within])


@pytest.mark.parametrize(("signed", "half_even"), CASES)
def test_error_is_at_most_half_a_step_except_at_the_saturated_top_code(signed, half_even):
  table = lowering.lowered_values(signed, half_even)
  shifts = np.asarray(lowering.range_shift(np.array(tops(signed)), signed))
  for r, e in zip(tops(signed), shifts.tolist(), strict=True):
    within = np.abs(all_codes(signed)) <= r
    q, value = all_codes(signed)[within], table[e][within]
    error = np.abs(q - value)
    top = 7 if signed else 15
    saturated = np.array([round(Fraction(int(v), 2**e)) for v in q]) >= top + 1
    half = 2**e // 2
    assert error[~saturated].max() <= half
    np.testing.assert_array_equal(value[saturated] >> e, top)
    assert np.all(error < 2**e)  # clipping costs less than one step, and only upwards
    assert np.all(q[saturated] > 0)


@pytest.mark.parametrize(("signed", "half_even"), CASES)
def test_error_falls_with_every_unused_bit(signed, half_even):
  q = all_codes(signed)
  errors = lowering.squared_errors(signed, half_even)
  unsaturated = np.abs(q) <= 112 if signed else q <= 240
  for e in range(4):
    reach = unsaturated & (np.abs(q) <= (7 if signed else 15) * 2**e)
    assert np.all(errors[e][reach] <= errors[e + 1][reach])
  # Averaged over all codes in reach, saturated ones included, by unused bits.
  unused = np.asarray(lowering.unused_bits(np.array(tops(signed)), signed)).tolist()
  means = [
    (u, errors[4 - u][np.abs(q) <= r].mean()) for r, u in zip(tops(signed), unused, strict=True)
  ]
  worst = [max(m for u, m in means if u == bits) for bits in range(5)]
  assert worst == sorted(worst, reverse=True)
  assert worst[4] == 0 < worst[3]


@settings(deadline=None, max_examples=60)
@given(st.booleans(), st.data())
def test_mse_shift_is_the_least_squares_one(half_even, data):
  signed = half_even or data.draw(st.booleans())
  codes = st.integers(-127, 127) if signed else st.integers(0, 255)
  groups = data.draw(st.lists(st.lists(codes, min_size=1, max_size=12), min_size=1, max_size=4))
  table = lowering.squared_errors(signed, half_even)
  sums = np.array([table[:, np.array(g) + (128 if signed else 0)].sum(axis=1) for g in groups])
  tops = np.array([max(map(abs, g)) for g in groups])
  chosen = lowering.choose_shifts("mse", tops, sums, signed)
  assert chosen.dtype == np.int32
  for group, e in zip(groups, chosen, strict=True):
    brute = [
      sum((q - (lowered_exactly(q, s, signed, half_even) << s)) ** 2 for q in group) for s in SHIFTS
    ]
    assert e == brute.index(min(brute))  # ties: the smaller shift
    assert brute[e] <= brute[int(lowering.range_shift(max(map(abs, group)), signed))]


def test_range_and_naive_shifts():
  tops, errors = np.array([[3, 127], [9, 64]]), np.zeros((2, 2, 5))
  np.testing.assert_array_equal(
    lowering.choose_shifts("range", tops, errors, True), [[0, 4], [1, 4]]
  )
  np.testing.assert_array_equal(
    lowering.choose_shifts("range", tops, errors, False), [[0, 3], [0, 3]]
  )
  np.testing.assert_array_equal(
    lowering.choose_shifts("naive", tops, errors, True), [[4, 4], [4, 4]]
  )
