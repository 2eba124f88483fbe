"""Distorted digits: how many, of which digits, and that the geometry is what it says."""

import numpy as np
import pytest

from flexiq_jax import data
from flexiq_jax.data import distorted


def pixels(source):
  return np.stack([np.asarray(source.image(i), float) for i in range(len(source))])


def test_sizes_labels_and_range():
  for split, count in (("train", 5408), ("test", 4450)):
    source, digits = (data.open_source(name, split) for name in ("distorted_digits", "digits"))
    assert (len(source), source.num_classes) == (count, 10)
    assert source.labels.tolist() == digits.labels.tolist() * distorted.COPIES[split]
    image = np.asarray(source.image(0))
    assert image.shape == (8, 8) and image.dtype == np.uint8
    # A copy is another image, and still of its digit: of all it is among the nearest to that.
    images, originals = pixels(source), pixels(digits)
    assert len({image.tobytes() for image in images}) == count
    a, b = (x.reshape(len(x), -1) for x in (images[: len(digits)], originals))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    alike = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
      b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T
    rank = (alike > np.diag(alike)[:, None]).mean(axis=1)
    assert np.median(rank) < 0.1


def test_no_digit_is_in_both_splits(monkeypatch):
  opened = []

  def opening(split):
    opened.append(split)
    return data.open_source("digits", split)

  monkeypatch.setattr(distorted, "open_digits", opening)
  for split in ("train", "test"):
    distorted._drawn.__wrapped__(split)
  assert opened == ["train", "test"]


def test_images_are_the_same_everywhere():
  source = data.open_source("distorted_digits", "test")
  np.testing.assert_array_equal(np.asarray(source.image(0))[3], [45, 201, 78, 0, 123, 102, 3, 0])


def test_places_are_read_bilinearly_with_black_around():
  image = np.arange(64.0).reshape(1, 8, 8) + 1
  y, x = np.mgrid[:8, :8][:, None] - 3.5
  np.testing.assert_allclose(distorted._sampled(image, y, x), image)
  np.testing.assert_allclose(distorted._sampled(image, x, -y), np.rot90(image, 1, (1, 2)))
  between = distorted._sampled(image, y, x + 0.25)
  np.testing.assert_allclose(between[0, :, :7], 0.75 * image[0, :, :7] + 0.25 * image[0, :, 1:])
  np.testing.assert_allclose(between[0, :, 7], 0.75 * image[0, :, 7])
  assert not distorted._sampled(image, y + 9, x).any()


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="dataset 'distorted_digits' is embedded and takes no root"):
    data.open_source("distorted_digits", root="here")
  with pytest.raises(ValueError, match=r"0\.\.4 is accepted for 5 classes"):
    data.open_source("distorted_digits", num_classes=5)
