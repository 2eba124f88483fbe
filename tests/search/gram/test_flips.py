"""Effects by finite differences, against the model run once for every flip."""

import numpy as np
import pytest

from flexiq_jax.search.gram.flips import Flips
from flexiq_jax.search.gram.surrogate import ledoit_wolf
from flexiq_jax.search.gram.ties import Ties
from flexiq_jax.search.settings import SearchSettings
from tests.search.networks_for_test import IMAGES, fitness, made


def softmax(z):
  e = np.exp(z - z.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=["l2", "kl"])
def measured(request):
  """A measurement around a random mask, and all changes of the logits `[T, n, K]`, one by one."""
  base = made().random_masks(3)[2]
  searched = fitness(distance=request.param, block=6)
  flips = Flips(searched, Ties(made().space, made().scores, 100), cuts=2)
  before = searched.forwards
  quadratic, share = flips.measure(None, base)
  cost = searched.forwards - before
  z = made().logits(base).astype(np.float64)
  changes = np.stack([made().logits(base ^ flip) - z for flip in np.eye(len(base), dtype=bool)])
  return request.param, base, flips, quadratic, share, cost, z, changes


def test_value_and_gradient_are_those_of_single_flips(measured):
  distance, base, _, quadratic, _, _, z, changes = measured
  z8 = made().logits(np.zeros_like(base))
  slope = z - z8 if distance == "l2" else (softmax(z) - softmax(z8)) / 2
  np.testing.assert_allclose(quadratic.value, made().distances(base, distance).mean(), rtol=1e-3)
  expected = (changes * slope).sum(axis=(1, 2)) / IMAGES
  np.testing.assert_allclose(quadratic.gradient, expected, atol=1e-3 * np.abs(expected).max())


def test_gram_matrix_is_that_of_single_flips(measured):
  distance, _, _, quadratic, share, _, z, changes = measured
  if distance == "kl":  # (diag p - p p') / 2
    p = softmax(z)
    metric = (np.eye(p.shape[1]) * p[:, None] - p[:, :, None] * p[:, None]) / 2
  else:
    metric = np.broadcast_to(np.eye(z.shape[1]), (IMAGES, z.shape[1], z.shape[1]))
  own = np.einsum("snk,nkl,tnl->nst", changes, metric, changes)
  gram = own.mean(axis=0)
  np.testing.assert_allclose(quadratic.gram, gram, atol=1e-3 * np.abs(gram).max())
  expected = ledoit_wolf(gram, np.square(own).mean(axis=0), IMAGES)
  np.testing.assert_allclose(share, expected, rtol=1e-2)


def test_only_what_follows_a_flip_is_counted(measured):
  flips, cost = measured[2], measured[5]
  assert cost == flips.forwards_each < made().space.total
  assert "each flipped alone" in flips.describe()


def test_ties_flip_together():
  ties = Ties(made().space, made().scores, 8)
  quadratic, _ = Flips(fitness(), ties, cuts=1).measure(None, np.zeros(ties.space.total, bool))
  masks = ties.expand(np.eye(ties.space.total, dtype=bool))
  expected = [made().distances(mask).mean() for mask in masks]
  np.testing.assert_allclose(np.diag(quadratic.gram), expected, rtol=1e-3)


def test_setting_names_the_two_ways():
  with pytest.raises(ValueError, match="effects: 'guess' is not one of probes, flips"):
    SearchSettings(effects="guess")
