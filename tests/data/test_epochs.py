"""Shuffled passes: the order is a function of (seed, epoch), memory and streaming agree."""

import numpy as np
import pytest

from flexiq_jax import data

_GREY = data.Preprocess(mean=(0.0,), std=(1.0,))


@pytest.fixture
def source():
  images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
  return data.ArraySource(images, np.arange(20), name="n", split="train", identity=("n",))


def _epochs(source, *, seed=0, memory_budget=data.MEMORY_BUDGET):
  indices = np.arange(3, 20)
  return data.Epochs(source, _GREY, 5, indices=indices, seed=seed, memory_budget=memory_budget)


def _order(epochs, number):
  batches = list(epochs.epoch(number))
  assert [len(labels) for _, labels in batches] == [5] * epochs.steps
  for images, labels in batches:
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)  # an image keeps its own label
    assert images.dtype == np.uint8 and labels.dtype == np.int32
  return np.concatenate([labels for _, labels in batches]).tolist()


def test_an_epoch_holds_the_given_examples_at_most_once(source):
  epochs = _epochs(source)
  assert epochs.steps == 3
  orders = [_order(epochs, number) for number in range(1, 30)]
  for order in orders:
    assert len(set(order)) == 15 and set(order) <= set(range(3, 20))
  # What the incomplete batch leaves out differs from epoch to epoch.
  assert set().union(*orders) == set(range(3, 20))


def test_the_order_is_a_function_of_seed_and_epoch(source):
  first = _order(_epochs(source), 7)
  assert _order(_epochs(source), 7) == first  # in a new process too: nothing is carried over
  assert _order(_epochs(source), 8) != first
  assert _order(_epochs(source, seed=1), 7) != first


def test_memory_and_streaming_agree_at_the_budget(source):
  kept, streamed = _epochs(source, memory_budget=17), _epochs(source, memory_budget=16)
  assert kept.in_memory and not streamed.in_memory
  for number in (1, 2):
    assert _order(kept, number) == _order(streamed, number)
