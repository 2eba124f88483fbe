"""The calibration draw: laws that hold for every dataset."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flexiq_jax import data


def _source(labels, name="toy", cheap=True):
  labels = np.asarray(labels)
  images = np.zeros((len(labels), 1, 1, 1), np.uint8)
  source = data.ArraySource(images, labels, name=name, split="train", identity=(name,))
  source.labels_are_cheap = cheap
  return source


@st.composite
def _draws(draw):
  labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=60))
  return labels, draw(st.integers(1, len(labels))), draw(st.integers(0, 2**32))


@hypothesis.given(_draws(), st.booleans())
def test_a_draw_is_fixed_without_repetition_and_nested(draw, cheap):
  labels, count, seed = draw
  source = _source(labels, cheap=cheap)
  got = data.calibration_indices(source, count, seed)
  assert got.shape == (count,) and len(set(got.tolist())) == count
  assert got.min() >= 0 and got.max() < len(labels)
  np.testing.assert_array_equal(got, data.calibration_indices(source, count, seed))
  every = data.calibration_indices(source, len(labels), seed)
  np.testing.assert_array_equal(got, every[:count])


@hypothesis.given(_draws())
def test_classes_are_balanced_as_far_as_they_reach(draw):
  labels, count, seed = draw
  drawn = np.asarray(labels)[data.calibration_indices(_source(labels), count, seed)]
  have, got = np.bincount(labels, minlength=5), np.bincount(drawn, minlength=5)
  # A class that still has examples left is at most one behind any other.
  left = have > got
  assert not left.any() or got[left].min() >= got.max() - 1


def test_the_draw_depends_on_the_seed():
  source = _source(np.arange(1000) % 10)
  draws = [tuple(data.calibration_indices(source, 20, seed)) for seed in range(5)]
  assert len(set(draws)) == 5
  # The order of the classes within a turn is random too: a short draw favours no class.
  first = {int(source.labels[d[0]]) for d in draws}
  assert len(first) > 1


def test_expensive_labels_are_not_read():
  class Expensive(data.ArraySource):
    labels_are_cheap = False

    @property
    def labels(self):
      raise AssertionError("labels were read")

  source = Expensive(
    np.zeros((9, 1, 1, 1), np.uint8), np.zeros(9, int), name="e", split="train", identity=("e",)
  )
  assert sorted(data.calibration_indices(source, 9, 0).tolist()) == list(range(9))


@pytest.mark.parametrize(
  ("count", "seed", "message"),
  [
    (11, 0, r"count of calibration examples is 11; 1\.\.10 is accepted for toy"),
    (0, 0, "count of calibration examples is 0"),
    (2.5, 0, "count of calibration examples is 2.5"),
    (True, 0, "count of calibration examples is True"),
    (3, -1, "seed is -1; a non-negative integer"),
    (3, 0.5, "seed is 0.5"),
  ],
)
def test_wrong_arguments_are_refused(count, seed, message):
  with pytest.raises(ValueError, match=message):
    data.calibration_indices(_source(np.arange(10)), count, seed)


def test_calibration_on_the_evaluation_data_is_refused():
  a, b = _source([0, 1], "a"), _source([0, 1], "b")
  data.require_separate(a, b)
  with pytest.raises(ValueError, match=r"calibration and evaluation both read a \(train, 2 images"):
    data.require_separate(a, a)
