"""Every way of computing a product of codes equals NumPy's int64, with the largest codes, too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.quant import exact
from tests.layers_for_test import CASES, conv, einsum

WIDE = {
  "convolution": conv((2, 3, 4, 256), (3, 3, 256, 3), padding=((1, 1), (1, 1))),
  "channels first": conv((2, 256, 3, 4), (3, 3, 256, 3), layout="NCHW"),
  "dilated": conv((1, 6, 5, 256), (3, 2, 256, 3), padding=((2, 2), (1, 0)), dilation=2),
  "pointwise": conv((2, 3, 4, 1400), (1, 1, 1400, 3), stride=2),
  "grouped": conv((2, 4, 4, 512), (3, 3, 256, 4), padding=((1, 1), (1, 1)), groups=2),
  "depthwise": conv((2, 4, 4, 8), (3, 3, 1, 8), padding=((1, 1), (1, 1)), groups=8),
  "dense": einsum("bc,cn->bn", (3, 1400), (1400, 4)),
}


def all_ways(case, signed, parts):
  """Way -> a platform that has it."""
  layer, contract = case.given_to_a_rule
  each = functools.partial(exact.ways, layer, contract, signed=signed, parts=parts)
  return {way: p for p in exact.PLATFORMS for way in each(p)}


def codes_of(case, signed, kind, seed=0):
  """Random codes, or the largest with one sign, which make the largest sums."""
  rng = np.random.default_rng(seed)
  low, high = (-127, 127) if signed else (0, 255)
  if kind == "random":
    return rng.integers(low, high + 1, case.x), rng.integers(-127, 128, case.w)
  w = np.full(case.w, 127 if kind == "largest" else -127)
  w[..., 0] -= np.sign(w[..., 0])  # not the same sum everywhere
  return np.full(case.x, high if kind == "largest" else low), w


@functools.cache
def compiled(case, **options):
  layer, contract = case.given_to_a_rule
  return jax.jit(functools.partial(exact.product, layer, contract=contract, **options))


def run(case, x, w, **options):
  call = compiled(case, **options)
  return np.asarray(call(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int8)))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", [*CASES, *(f"wide {name}" for name in WIDE)])
def test_every_way_equals_int64(name, signed):
  case = WIDE[name.removeprefix("wide ")] if name.startswith("wide ") else CASES[name]
  for kind in ("random", "largest", "smallest"):
    x, w = codes_of(case, signed, kind)
    expected, parts = case.exact(x, w), exact.parts(case.layer, w)
    for way, platform in all_ways(case, signed, parts).items():
      got = run(case, x, w, signed=signed, parts=parts, platform=platform, way=way)
      assert got.dtype == np.int32
      np.testing.assert_array_equal(got, expected, err_msg=f"{kind}, {platform}, {way}")
  # Nobody looked at the codes: the worst is assumed.
  got = run(case, x, w, signed=signed, platform="gpu")
  np.testing.assert_array_equal(got, expected)


def test_float32_counts_up_to_the_bound_and_not_beyond():
  """Weights' magnitudes of 2^17 in all and codes of -128: the sum is -2^24, the last one exact."""
  case = conv((1, 2, 2, 261), (2, 2, 261, 1))
  w = np.zeros(case.w, np.int64)
  w.reshape(-1)[: 2**17 // 127] = 127
  w.reshape(-1)[2**17 // 127] = 2**17 % 127
  assert w.sum() == 2**17
  x = np.zeros(case.x, np.int64)  # as codes less 128
  assert exact.parts(case.layer, w) == 1
  got = run(case, x, w, signed=False, parts=1, platform="gpu", way="float_result")
  np.testing.assert_array_equal(got, case.exact(x, w))
  lone = np.full(case.x, -128)
  np.testing.assert_array_equal(case.exact(lone, w), -(2**24))
  got = run(case, lone, w, signed=True, parts=1, platform="gpu", way="float_result")
  np.testing.assert_array_equal(got, -(2**24))
  # One weight more, and the sum is one that float32 has not.
  w.reshape(-1)[-1], lone.reshape(-1)[-1] = 1, -1
  assert exact.parts(case.layer, w) == 2
  cut = functools.partial(run, case, lone, w, signed=True, platform="gpu", way="float_result")
  np.testing.assert_array_equal(cut(parts=2), -(2**24) - 1)
  assert cut(parts=1) != -(2**24) - 1


def test_parts_are_as_few_as_the_codes_allow():
  case = conv((1, 3, 3, 512), (3, 3, 512, 2))
  layer = case.layer
  w = np.random.default_rng(0).integers(-40, 41, case.w)
  assert exact.worst_parts(layer) == 5 and exact.parts(layer, w) == 1
  assert exact.parts(layer, np.full(case.w, -128)) == 5
  # A weight may be either; both count.
  low = np.zeros(case.w, np.int64)
  low[0] = 128
  assert exact.parts(layer, np.abs(w) * 3, low) >= exact.parts(layer, np.abs(w) * 3) == 3
  tall = conv((1, 40, 40, 2), (40, 40, 2, 1))
  assert exact.parts(tall.layer, np.full(tall.w, 127)) == exact.worst_parts(tall.layer) == 0
  assert exact.ways(*tall.given_to_a_rule, "gpu", parts=0) == ("patches",)


def test_what_each_platform_takes_first():
  first = {
    name: tuple(exact.ways(*case.given_to_a_rule, p)[0] for p in exact.PLATFORMS)
    for name, case in (
      CASES | {"wide": WIDE["convolution"], "pointwise": WIDE["pointwise"]}
    ).items()
  }
  assert first == {
    "dense": ("integer", "matrix", "integer"),
    "dense, two feature dimensions": ("integer", "matrix", "integer"),
    "dense, shared dimension": ("integer", "matrix", "integer"),
    "dense, weights on the left": ("integer", "matrix", "integer"),
    "convolution": ("float32", "float_result", "integer"),
    "dilated": ("float32", "patches", "integer"),
    "grouped": ("float32", "patches", "integer"),
    "depthwise": ("multiply_add", "multiply_add", "integer"),
    "channels first": ("float32", "float_result", "integer"),
    "space first": ("float32", "float_result", "integer"),
    "wide": ("integer", "float_result", "integer"),
    "pointwise": ("integer", "patches", "integer"),
  }


def test_floats_count_only_where_they_count_exactly():
  def counts(channels, signed=True):
    case = conv((1, 4, 4, channels), (3, 3, channels, 7))
    return "float32" in exact.ways(*case.given_to_a_rule, "cpu", signed=signed)

  assert counts(113) and not counts(114)  # 9 * 113 * 128 * 128 < 2^24
  assert counts(57, signed=False) and not counts(58, signed=False)
  small = conv((1, 30, 30, 6), (22, 22, 1, 6), groups=6)
  large = conv((1, 30, 30, 6), (23, 23, 1, 6), groups=6)  # 23 * 23 * 255 * 128 > 2^24
  for platform in exact.PLATFORMS:
    assert "multiply_add" in exact.ways(*small.given_to_a_rule, platform)
    assert "multiply_add" not in exact.ways(*large.given_to_a_rule, platform)


def test_real_products_with_integer_weights():
  for name in ("depthwise", "convolution", "dense"):
    case = CASES[name]
    layer, contract = case.given_to_a_rule
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 9, case.x) / 4, rng.integers(-127, 128, case.w)
    for platform in exact.PLATFORMS:
      codes = jnp.asarray(w, jnp.int8)
      got = exact.real_product(layer, jnp.asarray(x, jnp.float32), codes, contract, platform)
      assert got.dtype == jnp.float32
      np.testing.assert_array_equal(got, case.exact(x * 4, w) / 4)


def test_unknown_names_are_refused():
  layer, contract = CASES["dense"].given_to_a_rule
  with pytest.raises(ValueError, match="platform: 'cuda' is not one of cpu, gpu, tpu"):
    exact.ways(layer, contract, "cuda")
  with pytest.raises(ValueError, match="way: 'patches'; of layer w integer are exact"):
    exact.product(
      layer,
      jnp.zeros((3, 10), jnp.int32),
      jnp.zeros((10, 4), jnp.int8),
      contract,
      signed=True,
      platform="cpu",
      way="patches",
    )
