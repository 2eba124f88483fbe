"""Sums over blocks against means over examples, in float64."""

import numpy as np

from flexiq_jax.search.gram.sums import Sums
from flexiq_jax.search.gram.surrogate import ledoit_wolf


def test_blocks_add_up_to_means_over_examples():
  rng = np.random.default_rng(0)
  distances, gradients = rng.random(7, np.float32), rng.normal(size=(7, 3))
  own = rng.normal(size=(7, 3, 3))
  own = own @ own.swapaxes(1, 2)
  base = np.array([True, False, True])
  sums = Sums(3)
  for block in (slice(0, 4), slice(4, 7)):
    sums.add_slope(distances[block], gradients[block].sum(axis=0))
    sums.add_gram(own[block].sum(axis=0), np.square(own[block]).sum(axis=0))
  model, share = sums.model(base, 7)
  np.testing.assert_allclose(model.value, distances.astype(np.float64).mean(), rtol=1e-12)
  np.testing.assert_allclose(model.gradient, gradients.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(model.gram, own.mean(axis=0), rtol=1e-12)
  np.testing.assert_array_equal(model.base, base)
  expected = ledoit_wolf(own.mean(axis=0), np.square(own).mean(axis=0), 7)
  np.testing.assert_allclose(share, expected, rtol=1e-12)


def test_without_a_slope_it_is_zero():
  """Around the 8-bit model there is no residual."""
  sums = Sums(2)
  sums.add_gram(np.eye(2), np.eye(2))
  sums.add_gram(np.eye(2), np.eye(2))
  model, _ = sums.model(np.zeros(2, bool), 2)
  assert model.value == 0 and not model.gradient.any() and isinstance(model.value, float)
