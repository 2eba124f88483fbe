""".npz files and the lossless CIFAR-10 tiles."""

import numpy as np
import pytest
from PIL import Image

from flexiq_jax import data
from flexiq_jax.data import arrays


def _images(count, *shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["{x}_{split}", "{split}_{x}"])
def test_npz_with_splits(tmp_path, save, prefix):
  names = {"x": ("x", "y"), "s": ("images", "labels")}["x" if prefix.startswith("{x}") else "s"]
  train, test = _images(5, 4, 3, 3), _images(2, 4, 3, 3, seed=1)
  content = {}
  for split, images in (("train", train), ("test", test)):
    content[prefix.format(x=names[0], split=split)] = images
    # Keras stores labels as uint8 [N, 1].
    content[prefix.format(x=names[1], split=split)] = np.arange(len(images), dtype=np.uint8)[
      :, None
    ]
  save(tmp_path / "a.npz", **content)
  for split, images in (("train", train), ("test", test)):
    source = data.open_source("npz", split, root=tmp_path / "a.npz")
    assert source.labels.tolist() == list(range(len(images))) and source.name == "npz"
    for i, image in enumerate(images):
      np.testing.assert_array_equal(np.asarray(source.image(i)), image)
  identities = [data.open_source("npz", s, root=tmp_path / "a.npz").identity for s in _splits()]
  assert identities[0] != identities[1]


def _splits():
  return ("train", "test")


def test_uncompressed_npz_is_mapped_and_compressed_is_not(tmp_path):
  # Fortran order and a key after another array: the offsets have to be right.
  images = np.asfortranarray(_images(6, 5, 4, 1))
  labels = np.arange(6)
  np.savez(tmp_path / "a.npz", labels=labels, images=images)
  np.savez_compressed(tmp_path / "b.npz", labels=labels, images=images)
  mapped = arrays._npz_array(tmp_path / "a.npz", "images")
  assert isinstance(mapped, np.memmap)
  np.testing.assert_array_equal(mapped, images)
  loaded = arrays._npz_array(tmp_path / "b.npz", "images")
  assert not isinstance(loaded, np.memmap)
  np.testing.assert_array_equal(loaded, images)


def test_npz_without_splits_is_the_same_data_for_both(tmp_path):
  np.savez(tmp_path / "a.npz", images=_images(3, 6, 6), labels=np.array([2, 0, 1]))
  train, test = (data.open_source("npz", s, root=tmp_path / "a.npz") for s in _splits())
  assert train.image(0).mode == "L" and train.image(0).size == (6, 6)
  with pytest.raises(ValueError, match="calibration and evaluation both read"):
    data.require_separate(train, test)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ({"pixels": _images(2, 4, 4, 3)}, r"holds the arrays pixels; for split 'train' x_train and y"),
    ({"images": _images(2, 4, 4, 3)}, r"holds the arrays images; .* or images and labels is acc"),
    (
      {"images": np.zeros((2, 4, 4, 3), np.float32), "labels": np.arange(2)},
      r"images of images and labels in .*a\.npz are float32 \[2, 4, 4, 3\]; uint8",
    ),
    (
      {"images": _images(2, 4, 4, 3), "labels": np.arange(3)},
      r"have shape \[3\]; \[2\], one for each image",
    ),
    ({"images": _images(2, 4, 4, 3), "labels": np.array([0, 7])}, r"a\.npz, image 1 is out of ran"),
    (
      {"images": _images(2, 4, 4, 3), "labels": np.array([0, "b"], dtype=object)},
      r"array labels of .*a\.npz cannot be read",
    ),
  ],
)
def test_wrong_npz_content_is_refused(tmp_path, content, message):
  np.savez(tmp_path / "a.npz", **content)
  with pytest.raises(ValueError, match=message):
    data.open_source("npz", root=tmp_path / "a.npz", num_classes=5)


def test_wrong_npz_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
    data.open_source("npz", root=tmp_path / "none.npz")
  with pytest.raises(FileNotFoundError, match=r"is a folder; the \.npz file itself"):
    data.open_source("npz", root=tmp_path)
  (tmp_path / "text.npz").write_text("hello")
  with pytest.raises(ValueError, match=r"text\.npz is no \.npz file"):
    data.open_source("npz", root=tmp_path / "text.npz")


@pytest.fixture
def small_tiles(tmp_path, monkeypatch):
  """The layout of the CIFAR-10 tiles with 3x3 tiles of 2x2 pixels a sheet."""
  monkeypatch.setattr(arrays, "_TILES", 3)
  monkeypatch.setattr(arrays, "_TILE", 2)
  images = _images(54, 2, 2, 3).reshape(6, 9, 2, 2, 3)
  labels = {}
  names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
  for name, sheet in zip(names, images, strict=True):
    pixels = sheet.reshape(3, 3, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(6, 6, 3)
    Image.fromarray(pixels).save(tmp_path / f"{name}.webp", lossless=True)
    labels[name] = np.arange(9, dtype=np.uint8)
  np.savez(tmp_path / "labels.npz", **labels)
  return tmp_path, images


def test_tiles_come_in_the_official_order(small_tiles):
  root, images = small_tiles
  train, test = (data.open_source("cifar10", s, root=root) for s in _splits())
  assert (len(train), len(test)) == (45, 9) and train.num_classes == 10
  for i in (0, 1, 3, 9, 44):
    np.testing.assert_array_equal(np.asarray(train.image(i)), images.reshape(54, 2, 2, 3)[i])
  np.testing.assert_array_equal(np.asarray(test.image(5)), images[5, 5])
  assert train.item(10)[1] == 1
  data.require_separate(train, test)


def test_wrong_tiles_are_refused(small_tiles):
  root, _ = small_tiles
  Image.new("RGB", (6, 4)).save(root / "data_batch_2.webp", lossless=True)
  with pytest.raises(ValueError, match=r"data_batch_2\.webp has 6x4 pixels; 6x6"):
    data.open_source("cifar10", root=root).image(9)
  (root / "data_batch_3.webp").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"data_batch_3\.webp does not decode"):
    data.open_source("cifar10", root=root).image(18)
  np.savez(root / "labels.npz", test_batch=np.arange(8))
  with pytest.raises(ValueError, match=r"has no array data_batch_1; it holds \['test_batch'\]"):
    data.open_source("cifar10", root=root)
  with pytest.raises(ValueError, match=r"test_batch of .* has shape \[8\]; \[9\]"):
    data.open_source("cifar10", "test", root=root)
  (root / "test_batch.webp").unlink()
  with pytest.raises(FileNotFoundError, match=r"test_batch\.webp is missing"):
    data.open_source("cifar10", "test", root=root)


@pytest.mark.data
def test_real_tiles_have_the_known_statistics(flexiq_data):
  source = data.open_source("cifar10", "test", root="$FLEXIQ_DATA/cifar10")
  assert np.bincount(source.labels).tolist() == [1000] * 10
  pixels = np.stack([np.asarray(source.image(i)) for i in range(0, 10000, 10)]) / 255
  # Mean of the test images; the first one is the well-known cat.
  np.testing.assert_allclose(pixels.mean((0, 1, 2)), [0.494, 0.485, 0.450], atol=0.01)
  assert source.item(0)[1] == 3 and np.asarray(source.image(0))[0, 0].tolist() == [158, 112, 49]


def test_a_negative_shape_is_refused(tmp_path):
  images = _images(11, 4, 3)
  np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(11, np.int64))
  whole = (tmp_path / "a.npz").read_bytes()
  assert whole.count(b"(11, 4, 3)") == 1
  (tmp_path / "a.npz").write_bytes(whole.replace(b"(11, 4, 3)", b"(-1, 4, 3)"))
  with pytest.raises(
    ValueError, match=r"array images of .* cannot be read: its header says shape \[-1"
  ):
    data.open_source("npz", root=tmp_path / "a.npz")
