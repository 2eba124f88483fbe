"""Operands of the mixed matmul from a kernel, against the lowering step in jnp."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.kernels import lower, tpu


def case(m: int, c: int, p: int, *, signed: bool, dtype=jnp.float32):
  rng = np.random.default_rng(p)
  # Values off the edges between codes, where a product and a quotient may round differently.
  steps = rng.integers(-160, 300, (m, c)) + rng.uniform(-0.4, 0.4, (m, c))
  order = np.full(p, -1)
  filled = rng.permutation(p)[:c]
  order[np.sort(filled)] = rng.permutation(c)[: len(filled)]
  scale = jnp.float32(0.25)
  x = jnp.asarray(steps * 0.25, dtype)
  shift = jnp.asarray(rng.integers(0, 5, p), jnp.int32)
  return x, scale, shift, jnp.asarray(order, jnp.int32), {"signed": signed}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("boundary", [0, 100, 256, 384])
def test_permuted_codes_are_those_of_the_lowering_step(signed, boundary):
  x, scale, shift, order, traits = case(70, 256, 384, signed=signed)
  boundary = jnp.int32(boundary)
  expected = lower.quantize_lower(x, scale, shift, boundary, order=order, **traits)
  got = tpu.quantize_lower(
    x, scale, shift, boundary, order=order, rows=64, interpret=True, **traits
  )
  used = np.asarray(order) >= 0  # padding meets weights of zero; any code does
  np.testing.assert_array_equal(got.x8[:, used], expected.x8[:, used])
  as_int = lambda a: np.asarray(a.astype(jnp.int8))[:, used]
  np.testing.assert_array_equal(as_int(got.x4), as_int(expected.x4))
  assert got.boundary == boundary


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_channels_that_keep_their_order(dtype):
  x, scale, shift, _, traits = case(64, 256, 256, signed=True, dtype=dtype)
  expected = lower.quantize_lower(x, scale, shift, jnp.int32(128), **traits)
  got = tpu.quantize_lower(x, scale, shift, jnp.int32(128), granule=128, interpret=True, **traits)
  edge = np.asarray(x, np.float32) / 0.25 % 1 == 0.5  # bfloat16 may put values there
  same = lambda a, b: np.asarray((a.astype(jnp.int8) == b.astype(jnp.int8)) | edge)
  assert same(got.x8, expected.x8)[:, 128:].all()
  assert same(got.x4, expected.x4)[:, :128].all()


def test_channels_that_fill_no_register_are_refused():
  with pytest.raises(NotImplementedError, match="x, shift: 100 channels and 128 places"):
    tpu.quantize_lower(
      jnp.zeros((4, 100)), jnp.float32(1), jnp.zeros(128, jnp.int32), jnp.int32(0), signed=True
    )
