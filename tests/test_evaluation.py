"""Top-1 over a stream."""

import gc
import weakref

import numpy as np
import pytest

from flexiq_jax import evaluation
from flexiq_jax.data import Batch


def batch(labels, size=None):
  """Images that are their own logits: the label's is the greatest."""
  size = size or len(labels)
  padded = np.zeros(size, np.int32)
  padded[: len(labels)] = labels
  return Batch(np.eye(5, dtype=np.float32)[padded], padded, np.arange(size) < len(labels))


def test_counts_right_answers():
  right, wrong = batch([0, 3, 4]), batch([1, 2])
  wrong = wrong._replace(images=np.roll(wrong.images, 1, axis=1))
  assert evaluation.top1(lambda x: x, [right, wrong]) == (60.0, 5)


def test_padding_does_not_count():
  # Padding would be right, too: its label is 0 and so is its image's.
  half = batch([1, 2], size=8)
  half.images[:2] = np.roll(half.images[:2], 1, axis=1)
  assert evaluation.top1(lambda x: x, [half]) == (0.0, 2)


def test_nan_in_padding_is_nobodys_business():
  padded = batch([1, 2], size=4)
  padded.images[2:] = np.nan
  assert evaluation.top1(lambda x: x, [padded]) == (100.0, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value):
  broken = batch([1, 2])
  broken.images[1, 3] = value
  with pytest.raises(ValueError, match="logits are not finite after example 3"):
    evaluation.top1(lambda x: x, [batch([0, 1, 2]), broken])


def test_no_image_is_refused():
  with pytest.raises(ValueError, match="no example to evaluate"):
    evaluation.top1(lambda x: x, [])


def test_batches_are_read_one_at_a_time():
  alive = []

  def stream():
    for label in range(5):
      made = batch([label])
      alive.append(weakref.ref(made.images))
      yield made
      del made
      gc.collect()
      # The one that was just evaluated, at most, is still held.
      assert sum(ref() is not None for ref in alive) <= 1

  assert evaluation.top1(lambda x: x + 0, stream()) == (100.0, 5)


def test_paired_difference_is_of_examples_and_not_of_runs():
  rng = np.random.default_rng(0)
  pairs = [(rng.random(50) < 0.8, rng.random(50) < 0.6) for _ in range(3)]
  each = np.mean([[float(a) - float(b) for a, b in zip(*pair, strict=True)] for pair in pairs], 0)
  points, error = evaluation.paired_difference(pairs)
  assert points == pytest.approx(100 * sum(each) / 50)
  assert error == pytest.approx(100 * np.sqrt(np.var(each, ddof=1) / 50))
  # A run twice adds nothing; a single example has no error.
  assert evaluation.paired_difference(pairs[:1] * 2) == evaluation.paired_difference(pairs[:1])
  assert evaluation.paired_difference([(np.array([True]), np.array([False]))]) == (100.0, None)
