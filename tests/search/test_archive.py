"""Archives: each mask is evaluated once, and estimates stay apart from what is known."""

import json

import numpy as np
import pytest

from flexiq_jax.search.archive import Archive, halved
from tests.search.networks_for_test import Counted, made


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 8])
def test_halving_is_exact_for_those_that_stay(blocks):
  fitness = Counted(blocks=blocks)
  masks = made().random_masks(13)[1:]
  values, stayed = halved(fitness, masks)
  spent = fitness.forwards
  exact = fitness(masks)
  np.testing.assert_array_equal(values[stayed], exact[stayed])
  assert values[stayed].max() < values[~stayed].min(initial=np.inf)
  assert stayed.sum() == {1: 12, 2: 6}.get(blocks, 3)
  # In float32, too, which is what a population's fitness is kept in.
  low = values.astype(np.float32)
  assert low[stayed].max() < low[~stayed].min(initial=np.inf)
  if blocks % 4 == 0:
    assert spent == pytest.approx(12 / 4 + 6 / 4 + 3 / 2)
  else:
    assert spent <= 12


def test_archive_keeps_estimates_apart():
  fitness = Counted()
  archive, masks = Archive(fitness, halving=True), made().random_masks(9)[1:]
  rough, exact = archive(masks), Counted()(masks)
  np.testing.assert_array_equal(archive(masks), rough)
  assert not np.array_equal(rough, exact)
  again = Archive(fitness, halving=True)
  again.load(json.loads(json.dumps(archive.dump())))
  before = fitness.forwards
  np.testing.assert_array_equal(again(masks), rough)
  assert fitness.forwards == before
  # What is known on all examples is not evaluated again, and takes the estimate's place.
  np.testing.assert_array_equal(again(masks, full=True), exact)
  assert fitness.forwards == before + 6
  np.testing.assert_array_equal(again(masks), exact)
  assert fitness.forwards == before + 6
