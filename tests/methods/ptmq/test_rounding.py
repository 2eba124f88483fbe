"""Learned rounding: h, its start, its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.quant import quantizer


def test_it_starts_at_the_real_weights():
  steps = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 3, jnp.float32)
  low, high = quantizer.code_range(4)
  found = rounding.soft_codes(steps, rounding.start(steps), low, high)
  inside = (np.asarray(steps) > low) & (np.asarray(steps) < high)
  np.testing.assert_allclose(found[inside], steps[inside], atol=1e-5)
  assert float(found.min()) == low and float(found.max()) == high
  # And it would end at the nearest codes.
  hard = rounding.hard_codes(steps, rounding.start(steps), 4)
  assert (np.asarray(hard) == np.asarray(quantizer.quantize(steps, 1.0, 4))).mean() > 0.999


def test_h_and_its_inverse():
  h = jnp.linspace(0, 1, 101)
  np.testing.assert_allclose(rounding.rectified(rounding.inverse(h)), h, atol=1e-6)
  v = jnp.asarray([-100.0, -3.0, 0.0, 3.0, 100.0])
  np.testing.assert_allclose(rounding.rectified(v), [0, 0, 0.5, 1, 1], atol=1e-6)
  slope = jax.vmap(jax.grad(rounding.rectified))(v)
  assert slope[2] > 0 and slope[0] == slope[4] == 0


@pytest.mark.parametrize("up", [-100.0, 100.0])
def test_codes_lie_beside_the_weight(up):
  steps = jnp.asarray([-9.3, -8.0, -0.5, 0.2, 6.9, 7.5])
  found = rounding.hard_codes(steps, jnp.full(6, up), 4)
  expected = np.clip(np.floor(np.asarray(steps)) + (up > 0), -8, 7)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(rounding.soft_codes(steps, jnp.full(6, up), -8, 7), expected)


def test_regularizer_is_nothing_at_both_ends():
  v = jnp.asarray([-50.0, 50.0])
  assert float(rounding.regularizer(v, 2.0)) == pytest.approx(0, abs=1e-5)
  assert float(rounding.regularizer(jnp.zeros(3), 20.0)) == 3
  h = 0.8
  found = rounding.regularizer(rounding.inverse(jnp.asarray([h])), 2.0)
  assert float(found) == pytest.approx(1 - 0.6**2, rel=1e-4)


def test_decided():
  v = {"a": jnp.asarray([-50.0, 50.0]), "b": jnp.asarray([[0.0], [rounding.inverse(0.02)]])}
  assert rounding.decided(v) == 0.5


def test_beta_falls_after_the_warm_up():
  beta = [float(rounding.beta_at(step, 100, 0.2)) for step in (0, 20, 60, 100)]
  np.testing.assert_allclose(beta, [20, 20, 11, 2], rtol=1e-6)
