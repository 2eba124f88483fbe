"""Quantized activations: values, and gradients by both arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.methods import activations


@pytest.mark.parametrize("signed", [False, True])
def test_values_and_gradients(signed):
  x, scale = jnp.asarray([-9.0, -0.6, 0.3, 0.49, 0.51, 1.4, 9.0]), 0.5
  of = lambda x, scale: activations.rounded(x, scale, 2, signed)
  low, high = (-2, 1) if signed else (0, 3)
  steps = np.asarray(x) / scale
  codes = np.clip(np.rint(steps), low, high)
  np.testing.assert_allclose(of(x, scale), scale * codes)
  by_x, by_scale = jax.vmap(jax.grad(of, argnums=(0, 1)), in_axes=(0, None))(x, scale)
  inside = (steps > low) & (steps < high)
  np.testing.assert_allclose(by_x, inside.astype(np.float32))
  # code - v / s, or the code where v saturates.
  np.testing.assert_allclose(by_scale, np.where(inside, codes - steps, codes), atol=1e-6)
