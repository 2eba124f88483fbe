"""Packing, operands and the reference of the mixed matmul, against NumPy int64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import kernels
from flexiq_jax.kernels import Activations, Epilogue, Requantize, lower, packing
from flexiq_jax.quant import lowering, quantizer
from tests.kernels.operands_for_test import operands, oracle, raw


def test_pack_and_unpack_are_inverse_and_in_the_documented_order():
  codes = np.random.default_rng(0).integers(-8, 8, (6, 5))
  packed = packing.pack(jnp.asarray(codes))
  assert packed.dtype == jnp.int8 and packed.shape == (3, 5)
  np.testing.assert_array_equal(packing.unpack(packed), codes)
  of_numpy = packing.pack(codes)
  assert isinstance(of_numpy, np.ndarray) and of_numpy.dtype == np.int8
  np.testing.assert_array_equal(of_numpy, packed)
  np.testing.assert_array_equal(np.asarray(packed)[:, 0] & 15, codes[0::2, 0] & 15)
  with pytest.raises(ValueError, match="codes: 3 rows"):
    packing.pack(jnp.zeros((3, 2), jnp.int32))


@given(
  seed=st.integers(0, 2**31),
  boundary=st.integers(0, 24),
  signed=st.booleans(),
  dynamic=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_reference_equals_the_oracle(seed, boundary, signed, dynamic):
  x, w = operands(seed, 5, 7, 3, 8, boundary, signed=signed, dynamic=dynamic)
  epilogue = raw(7, seed)
  got = kernels.mixed_matmul(x, w, epilogue, implementation="reference")
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(epilogue.correction))


def test_boundary_is_traced():
  traces = []

  @jax.jit
  def run(x, w, epilogue):
    traces.append(1)
    return kernels.mixed_matmul(x, w, epilogue)

  for boundary in (0, 3, 16, 24):
    x, w = operands(boundary, 4, 6, 3, 8, boundary)
    np.testing.assert_array_equal(run(x, w, raw(6)), oracle(x, w) + np.asarray(raw(6).correction))
  assert len(traces) == 1


@pytest.mark.parametrize("signed", [True, False])
def test_split_keeps_one_precision(signed):
  lo, hi = quantizer.code_range(8, signed)
  codes = jnp.arange(lo, hi + 1, dtype=jnp.int32)[None]
  low = jnp.arange(codes.size)[None] % 3 == 0
  x8, x4 = lower.split_codes(codes, jnp.int32(3), low, signed)
  off8, off4 = (0, 0) if signed else (128, 8)
  q4 = lowering.lower_activations(codes, 3, signed)
  np.testing.assert_array_equal(x8, np.where(low, 0, codes - off8))
  np.testing.assert_array_equal(x4.astype(jnp.int8), np.where(low, q4 - off4, 0))


def test_quantize_lower_permutes_and_pads():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
  order = jnp.asarray([2, 0, -1, 1], jnp.int32)
  shift = jnp.asarray([1, 1, 0, 0], jnp.int32)
  got = kernels.quantize_lower(x, jnp.float32(0.02), shift, jnp.int32(2), signed=True, order=order)
  codes = np.clip(np.rint(np.asarray(x) / np.float32(0.02)), -128, 127).astype(int)
  zero = np.zeros(4, int)
  np.testing.assert_array_equal(got.x8, np.stack([zero, zero, zero, codes[:, 1]], 1))
  low = np.clip((codes + 1) >> 1, -8, 7)
  np.testing.assert_array_equal(
    got.x4.astype(jnp.int8), np.stack([low[:, 2], low[:, 0], zero, zero], 1)
  )


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "gelu", "gelu_tanh"])
def test_epilogue(activation):
  x, w = operands(3, 4, 6, 3, 8, 8)
  rng = np.random.default_rng(0)
  epilogue = Epilogue(
    scale=jnp.asarray(rng.uniform(1e-5, 1e-4, 6), jnp.float32),
    correction=jnp.asarray(rng.integers(-99, 99, 6), jnp.int32),
    bias=jnp.asarray(rng.normal(size=6), jnp.float32),
    activation=activation,
  )
  y = (oracle(x, w) + np.asarray(epilogue.correction)) * np.asarray(epilogue.scale, np.float64)
  y += np.asarray(epilogue.bias)
  functions = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "gelu": lambda y: np.asarray(jax.nn.gelu(y.astype(np.float32), approximate=False)),
    "gelu_tanh": lambda y: np.asarray(jax.nn.gelu(y.astype(np.float32), approximate=True)),
  }
  expected = functions[activation](y)
  np.testing.assert_allclose(kernels.mixed_matmul(x, w, epilogue), expected, rtol=1e-5, atol=1e-5)
  half = kernels.mixed_matmul(x, w, dataclasses.replace(epilogue, out="bfloat16"))
  assert isinstance(half, jax.Array) and half.dtype == jnp.bfloat16


def test_requantize_makes_the_next_operands():
  x, w = operands(4, 4, 6, 3, 8, 8)
  epilogue = Epilogue(
    scale=jnp.full(6, 1e-4, jnp.float32),
    correction=jnp.zeros(6, jnp.int32),
    activation="relu",
    requantize=Requantize(
      scale=jnp.float32(0.01),
      boundary=jnp.int32(4),
      shift=jnp.asarray([0, 1, 2, 3, 4, 4], jnp.int32),
      signed=False,
    ),
  )
  got = kernels.mixed_matmul(x, w, epilogue)
  assert isinstance(got, Activations)
  y = np.maximum(oracle(x, w) * np.float32(1e-4), 0)
  codes = np.clip(np.rint(y / np.float32(0.01)), 0, 255).astype(int)
  shift = np.array([0, 1, 2, 3, 4, 4])
  low = np.clip((codes + ((1 << shift) >> 1)) >> shift, 0, 15)
  np.testing.assert_array_equal(got.x8[:, 4:], codes[:, 4:] - 128)
  np.testing.assert_array_equal(got.x4.astype(jnp.int8)[:, :4], low[:, :4] - 8)
  assert not got.x8[:, :4].any() and not got.x4.astype(jnp.int8)[:, 4:].any()
  assert got.boundary == 4


@pytest.mark.parametrize(
  ("field", "value", "match"),
  [
    ("x8", jnp.zeros((4, 24), jnp.int32), r"x8: int32 \[4, 24\]; int8"),
    ("x4", jnp.zeros((4, 24), jnp.int8), r"x4: int8 \[4, 24\]; int4"),
    ("boundary", jnp.zeros(1, jnp.int32), r"boundary: int32 \[1\]; int32 \[\]"),
    ("w4", jnp.zeros((24, 6), jnp.int8), r"w4: int8 \[24, 6\]; int8 \[12, 6\]"),
    ("w_shift", jnp.zeros((2, 6), jnp.int32), r"w_shift: int32 \[2, 6\]; int32 \[3, 6\]"),
    ("scale", jnp.zeros(5, jnp.float32), r"scale: float32 \[5\]; float32 \[6\]"),
    ("block", 7, "block: 7 rows"),
    ("offset", 3, "offset: 3"),
    ("activation", "swish", "activation: 'swish'"),
    ("out", "float16", "out: 'float16'"),
  ],
)
def test_operands_that_do_not_fit_are_refused(field, value, match):
  x, w = operands(0, 4, 6, 3, 8, 8)
  parts = [x, w, raw(6)]
  owner = next(i for i, part in enumerate(parts) if hasattr(part, field))
  parts[owner] = dataclasses.replace(parts[owner], **{field: value})
  with pytest.raises(ValueError, match=match):
    kernels.mixed_matmul(*parts)


def test_implementations_are_checked():
  x, w = operands(0, 4, 6, 3, 8, 8)
  with pytest.raises(ValueError, match="implementation: 'cuda' is not one of"):
    kernels.mixed_matmul(x, w, raw(6), implementation="cuda")
  with pytest.raises(NotImplementedError, match="'tpu' does not run on cpu"):
    kernels.mixed_matmul(x, w, raw(6), implementation="tpu")


def test_codes_are_of_true_quotients():
  """At the edge of two codes a product with the scale's inverse would take the other one."""
  rng = np.random.default_rng(0)
  scale = np.float32(0.30475107)
  edges = (np.arange(-100, 100) + np.float32(0.5)) * scale
  x = np.concatenate([np.nextafter(edges, np.float32(s), dtype=np.float32) for s in (-99, 99)])
  x = np.tile(np.concatenate([x, edges.astype(np.float32)]), (4, 1))
  k, unlike = x.shape[1], np.float32(1) / scale
  expected = np.round(x / scale)
  assert (expected != np.round(x * unlike)).sum() > 10
  shift = jnp.asarray(rng.integers(0, 5, k), jnp.int32)
  run = jax.jit(functools.partial(lower.quantize_lower, signed=True))
  got = run(jnp.asarray(x), jnp.float32(scale), shift, jnp.int32(0))
  np.testing.assert_array_equal(got.x8, expected)
