"""Convolutions written out over their windows equal XLA's own, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flexiq_jax.graph import unfold

CASES = {
  "same": {},
  "stride and asymmetric padding": {"strides": (2, 1), "padding": ((0, 1), (2, 1))},
  "dilation": {"dilation": (2, 3)},
  "negative padding": {"padding": ((-1, 2), (0, -1))},
  "pixels apart": {"spread": (2, 3), "strides": (1, 2)},
  "multiplier": {"multiplier": 3},
  "channels first": {"layout": ("NCHW", "OIHW", "NCHW")},
  "one dimension": {"size": (9,), "window": (5,), "layout": ("NWC", "WIO", "NWC")},
}


def parameters(size=(7, 8), window=(3, 3), multiplier=1, layout=("NHWC", "HWIO", "NHWC"), **given):
  channels, rank = 6, len(size)
  groups = given.get("groups", channels)
  shapes = {"N": 2, "C": channels, "I": channels // groups, "O": channels * multiplier}
  spatial = dict(zip(layout[0].replace("N", "").replace("C", ""), size, strict=True))
  kernel = dict(zip(layout[1].replace("I", "").replace("O", ""), window, strict=True))
  x_shape = [(shapes | spatial)[d] for d in layout[0]]
  w_shape = [(shapes | kernel)[d] for d in layout[1]]
  params = {
    "window_strides": given.get("strides", (1,) * rank),
    "padding": given.get("padding", ((1, 1),) * rank),
    "lhs_dilation": given.get("spread", (1,) * rank),
    "rhs_dilation": given.get("dilation", (1,) * rank),
    "dimension_numbers": lax.conv_dimension_numbers(x_shape, w_shape, layout),
    "feature_group_count": groups,
    "batch_group_count": 1,
  }
  return params, x_shape, w_shape


@pytest.mark.parametrize("case", CASES)
def test_equals_the_integer_convolution(case):
  params, x_shape, w_shape = parameters(**CASES[case])
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(0, 256, x_shape), jnp.uint8)
  w = jnp.asarray(rng.integers(-128, 128, w_shape), jnp.int8)
  expected = lax.conv_general_dilated(x.astype(jnp.int32), w.astype(jnp.int32), **params)
  got = unfold.multiply_add(params, x, w)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got.astype(jnp.int32), expected)


def test_under_vmap_over_weights():
  params, x_shape, w_shape = parameters()
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.integers(-127, 128, x_shape), jnp.int8)
  w = jnp.asarray(rng.integers(-127, 128, (3, *w_shape)), jnp.int8)
  got = jax.vmap(lambda w: unfold.multiply_add(params, x, w))(w)
  for y, one in zip(got, w, strict=True):
    np.testing.assert_array_equal(y, unfold.multiply_add(params, x, one))


def in_two_ways(product, **case):
  """`(value, derivatives)` of a product and of XLA's convolution, on small integers."""
  params, x_shape, w_shape = parameters(**case)
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.integers(-8, 9, x_shape), jnp.float32)
  w = jnp.asarray(rng.integers(-8, 9, w_shape), jnp.float32)
  convolve = lambda x, w: lax.conv_general_dilated(x, w, **params)
  y, expected = jax.vjp(convolve, x, w)
  g = jnp.asarray(rng.integers(-8, 9, y.shape), jnp.float32)
  got, pull = jax.vjp(lambda x, w: product(params, convolve, x, w), x, w)
  return (got, *pull(g)), (y, *expected(g))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_depthwise_convolutions(case):
  product = lambda params, _, x, w: unfold.differentiable_multiply_add(params, x, w)
  for ours, theirs in zip(*in_two_ways(product, **CASES[case]), strict=True):
    np.testing.assert_array_equal(ours, theirs)  # integers: exact in any order


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_convolutions_of_one_pixel(case):
  case = CASES[case] | {"groups": 1, "window": (1,) * len(CASES[case].get("size", (7, 8)))}
  for ours, theirs in zip(*in_two_ways(unfold.differentiable_pointwise, **case), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("case", CASES)
def test_patches_equal_the_integer_convolution(case, groups):
  params, x_shape, w_shape = parameters(**CASES[case], groups=groups)
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.integers(-128, 128, x_shape), jnp.int8)
  w = jnp.asarray(rng.integers(-128, 128, w_shape), jnp.int8)
  expected = lax.conv_general_dilated(x.astype(jnp.int32), w.astype(jnp.int32), **params)
  got = unfold.patch_product(params, x, w, jnp.int32)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, expected)
