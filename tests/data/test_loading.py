"""Batches: fixed size, deterministic order, bounded prefetch, errors that name the example."""

import threading

import numpy as np
import pytest
from PIL import Image

from flexiq_jax import data
from flexiq_jax.data import loading

_GREY = data.Preprocess(mean=(0.0,), std=(1.0,))


class _Counting(data.Source):
  """Images of one pixel whose value is their index; counts what has been read."""

  def __init__(self, count, fail_at=None, odd_at=None):
    super().__init__("counting", "train", 256, ("counting",))
    self.count, self.fail_at, self.odd_at = count, fail_at, odd_at
    self.reads, self.lock = 0, threading.Lock()

  def __len__(self):
    return self.count

  @property
  def labels(self):
    return np.arange(self.count, dtype=np.int32)

  def _read(self, index):
    with self.lock:
      self.reads += 1
    if index == self.fail_at:
      raise ValueError(f"image {index} does not decode")
    size = (2, 1) if index == self.odd_at else (1, 1)
    return Image.new("L", size, index), index


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_every_example_once_in_order_and_the_last_batch_padded(count, batch_size):
  got = list(data.batches(_Counting(count), _GREY, batch_size))
  assert len(got) == -(-count // batch_size)
  for batch in got:
    assert batch.images.shape == (batch_size, 1, 1, 1) and batch.images.dtype == np.float32
    assert batch.labels.dtype == np.int32 and batch.mask.dtype == bool
    assert not batch.images[~batch.mask].any() and not batch.labels[~batch.mask].any()
  mask = np.concatenate([b.mask for b in got])
  labels = np.concatenate([b.labels for b in got])
  images = np.concatenate([b.images for b in got])
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < count)
  np.testing.assert_array_equal(labels[mask], np.arange(count))
  np.testing.assert_array_equal(images[mask, 0, 0, 0], np.arange(count, dtype=np.float32) / 255)


def test_indices_give_choice_and_order():
  got = list(data.batches(_Counting(20), _GREY, 3, indices=[7, 2, 2, 19]))
  assert [b.labels.tolist() for b in got] == [[7, 2, 2], [19, 0, 0]]
  raw = list(data.raw_batches(_Counting(20), _GREY, 3, indices=np.array([7, 2, 2, 19])))
  assert [(i[:, 0, 0, 0].tolist(), y.tolist()) for i, y in raw] == [([7, 2, 2],) * 2, ([19],) * 2]
  assert raw[0][0].dtype == np.uint8


def test_prefetch_is_bounded_and_stops_with_the_consumer(monkeypatch):
  monkeypatch.setattr(loading.os, "cpu_count", lambda: 2)
  source = _Counting(200)
  before = threading.active_count()
  iterator = data.batches(source, _GREY, 8)
  assert source.reads == 0  # nothing is read before it is asked for
  next(iterator)
  # 8 delivered, at most a window of 8 ahead.
  assert 8 <= source.reads <= 16
  del iterator
  assert source.reads <= 16 and threading.active_count() == before


def test_an_image_that_fails_is_reported_and_stops_the_threads():
  source = _Counting(50, fail_at=5)
  before = threading.active_count()
  with pytest.raises(ValueError, match="image 5 does not decode"):
    list(data.batches(source, _GREY, 4))
  assert threading.active_count() == before


def test_images_of_different_shapes_are_refused():
  with pytest.raises(ValueError, match=r"example 6 of counting .* shape \[1, 2, 1\].*set crop"):
    list(data.batches(_Counting(9, odd_at=6), _GREY, 4))
  deep = data.ArraySource(
    np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, int), name="d", split="train", identity=("d",)
  )
  deep._read = lambda index: (Image.new("I;16", (2, 2)), 0)
  with pytest.raises(ValueError, match=r"example 0 of d .*: image of mode I;16"):
    list(data.batches(deep, _GREY, 1))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 2.5}, "batch_size is 2.5"),
    ({"batch_size": 2, "indices": []}, "a non-empty list of integers"),
    ({"batch_size": 2, "indices": [0.5]}, "a non-empty list of integers"),
    ({"batch_size": 2, "indices": [3, 10]}, r"index 10 is outside 0\.\.9 of counting"),
    ({"batch_size": 2, "indices": [-1]}, r"index -1 is outside"),
  ],
)
def test_wrong_arguments_are_refused_at_the_call(options, message):
  with pytest.raises(ValueError, match=message):
    data.batches(_Counting(10), _GREY, **options)
