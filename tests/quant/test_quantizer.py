"""Uniform quantizers and clipping ranges, against exact arithmetic and brute-force searches."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.quant import quantizer


@pytest.mark.parametrize(
  ("bits", "signed", "want"),
  [
    (8, True, (-127, 127)),  # every magnitude fits 7 bits
    (8, False, (0, 255)),
    (6, True, (-32, 31)),
    (4, True, (-8, 7)),
    (4, False, (0, 15)),
    (2, True, (-2, 1)),
  ],
)
def test_code_range(bits, signed, want):
  assert quantizer.code_range(bits, signed) == want


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_code_range_refuses_other_widths(bits):
  with pytest.raises(ValueError, match=rf"bits: {bits} is not in 2\.\.8"):
    quantizer.code_range(bits)


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8),
  st.integers(-6, 6),
  st.integers(2, 8),
  st.booleans(),
)
def test_codes_are_rounded_half_to_even_and_saturated(values, exponent, bits, signed):
  scale = 2.0**exponent  # powers of two divide exactly
  lo, hi = quantizer.code_range(bits, signed)
  want = [min(max(round(Fraction(v) / Fraction(scale)), lo), hi) for v in values]
  codes = quantizer.quantize(jnp.asarray(values, jnp.float32), jnp.float32(scale), bits, signed)
  assert codes.dtype == jnp.int32
  np.testing.assert_array_equal(codes, want)


def test_ties_go_to_even():
  x = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5])
  np.testing.assert_array_equal(quantizer.quantize(x, 1.0, 8), [0, 2, 2, 0, -2])


def test_bfloat16_is_quantized_in_float32():
  x = jnp.array([100.0, 33.25], jnp.bfloat16)
  scale = jnp.float32(1.003)
  want = np.rint(np.asarray(x, np.float32) / np.float32(1.003))
  np.testing.assert_array_equal(quantizer.quantize(x, scale, 8), want)


def test_scale_maps_the_range_to_the_largest_code():
  np.testing.assert_allclose(quantizer.scale_for(jnp.array([127.0, 0.0]), 8), [1.0, 1.0])
  np.testing.assert_allclose(quantizer.scale_for(jnp.float32(30.0), 4, signed=False), 2.0)
  np.testing.assert_allclose(quantizer.scale_for(jnp.float32(3.5), 4), 0.5)


def candidates(bits):
  return np.linspace(0.3, 1, 71) if bits >= 6 else np.linspace(0.1, 1, 91)


def squared_error(x, scale, bits, signed=True):
  lo, hi = quantizer.code_range(bits, signed)
  return np.square(x - np.clip(np.rint(x / scale), lo, hi) * scale).sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_scale(bits):
  w = np.random.default_rng(0).standard_t(3, size=(2, 5, 9, 3)).astype(np.float32)
  w[1, :, :, 2] = 0  # an output that is switched off
  hi = quantizer.code_range(bits)[1]
  tops = np.abs(w).max(axis=(1, 2))
  largest = quantizer.weight_scale(w, bits, "max")
  assert largest.shape == (2, 3)
  np.testing.assert_allclose(largest, np.where(tops > 0, tops / hi, 1), rtol=1e-6)
  clipped = quantizer.weight_scale(w, bits, "percentile", 80.0)
  want = np.percentile(np.abs(w), 80, axis=(1, 2))
  np.testing.assert_allclose(clipped, np.where(want > 0, want / hi, 1), rtol=1e-5)
  least = np.asarray(quantizer.weight_scale(w, bits, "mse"), np.float64)
  for g, n in np.ndindex(2, 3):
    x = w[g, :, :, n].astype(np.float64)
    if tops[g, n] == 0:
      assert least[g, n] == 1
      continue
    errors = [squared_error(x, f * tops[g, n] / hi, bits) for f in candidates(bits)]
    assert squared_error(x, least[g, n], bits) == pytest.approx(min(errors), rel=1e-4)
    # Clipping the heavy tails is what the search is for, and no finer search does much better.
    fine = [squared_error(x, f * tops[g, n] / hi, bits) for f in np.linspace(0.1, 1, 1000)]
    assert min(errors) <= min(errors[-1], 1.2 * min(fine))


def histogram(x, bins=4096):
  counts, edges = np.histogram(x, bins)
  return counts, edges


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_activation_scale_from_a_histogram_is_close_to_the_direct_search(bits, signed):
  x = np.random.default_rng(1).standard_t(4, size=20_000)
  x = x if signed else np.abs(x)
  counts, edges = histogram(x)
  width = edges[1] - edges[0]
  hi = quantizer.code_range(bits, signed)[1]
  top = np.abs(x).max()
  args = (counts, edges, bits, signed)
  assert quantizer.activation_scale(*args, "max") == pytest.approx(top / hi, rel=1e-6)
  for p in (50.0, 99.0):
    clip = hi * quantizer.activation_scale(*args, "percentile", p)
    assert abs(clip - np.percentile(np.abs(x), p)) <= 2 * width
  all_of_it = hi * quantizer.activation_scale(*args, "percentile", 100.0)
  assert abs(all_of_it - top) <= width
  direct = min(squared_error(x, f * top / hi, bits, signed) for f in candidates(bits))
  chosen = squared_error(x, quantizer.activation_scale(*args, "mse"), bits, signed)
  assert direct * 0.999 <= chosen <= direct * 1.01


@pytest.mark.parametrize("signed", [True, False])
def test_joint_scale_is_the_least_error_of_both_widths(signed):
  x = np.random.default_rng(2).laplace(size=4000)
  x = x if signed else np.abs(x)
  counts, edges = histogram(x)
  top, hi = np.abs(x).max(), quantizer.code_range(8, signed)[1]
  lo4, hi4 = (-8, 7) if signed else (0, 15)

  def error(scale):
    q = np.clip(np.rint(x / scale), -hi if signed else 0, hi)
    wide = np.square(x - q * scale).sum()
    narrow = [
      np.square(x - np.clip(np.floor(q / 2**e + 0.5), lo4, hi4) * 2**e * scale).sum()
      for e in range(5)
    ]
    return quantizer.JOINT_WEIGHT * wide + min(narrow)

  chosen = quantizer.activation_scale(counts, edges, 8, signed, "joint")
  candidates = [error(f * top / hi) for f in np.linspace(0.3, 2, 171)]
  assert error(chosen) <= min(candidates) * 1.01
  assert error(chosen) < error(top / hi)
  assert error(chosen) <= error(quantizer.activation_scale(counts, edges, 8, signed, "mse"))
  # Without codes in the codes there is nothing joint.
  four = [quantizer.activation_scale(counts, edges, 4, signed, m) for m in ("joint", "mse")]
  assert four[0] == four[1]


def test_activation_scale_counts_how_often_values_occur():
  """One outlier decides where it stands alone, and not where 10^6 small values outvote it."""
  edges = np.linspace(-1, 1, 4097)
  counts = np.zeros(4096, np.int64)
  counts[-1] = 1
  assert quantizer.activation_scale(counts, edges, 4, True, "mse") * 7 > 0.9
  counts[2048 : 2048 + 400] = 10**6
  assert quantizer.activation_scale(counts, edges, 4, True, "mse") * 7 < 0.3


def test_activation_scale_of_nothing_and_of_zeros():
  edges = np.linspace(0, 0, 5)
  assert quantizer.activation_scale(np.zeros(4, int), edges, 8, True, "mse") == 1
  for method in quantizer.ACTIVATION_RANGES:
    assert quantizer.activation_scale(np.array([9, 0, 0, 0]), edges, 8, False, method) == 1


def test_unknown_names_are_refused():
  quantizer.check_one_of("weight", "mse", quantizer.WEIGHT_RANGES)
  with pytest.raises(ValueError, match=r"weight: 'joint' is not one of max, percentile, mse$"):
    quantizer.check_one_of("weight", "joint", quantizer.WEIGHT_RANGES)
