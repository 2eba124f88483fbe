"""What all sources share, the registry, and the digits."""

import numpy as np
import pytest

from flexiq_jax import data
from flexiq_jax.data.source import check_labels


def _source(images=None, labels=None, **options):
  images = np.zeros((3, 4, 5, 3), np.uint8) if images is None else images
  labels = np.array([0, 1, 2]) if labels is None else labels
  return data.ArraySource(
    images, labels, name="toy", split="train", identity=("toy", "train"), **options
  )


def test_array_source_gives_back_its_arrays():
  rng = np.random.default_rng(0)
  for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
    images = rng.integers(0, 256, (2, 4, 5, channels), dtype=np.uint8)
    source = _source(images, np.array([1, 0]))
    assert len(source) == 2 and source.num_classes == 2
    assert source.labels.dtype == np.int32 and source.labels.tolist() == [1, 0]
    image, label = source.item(1)
    assert image.mode == mode and image.size == (5, 4) and label == 0
    np.testing.assert_array_equal(np.asarray(image).reshape(4, 5, channels), images[1])


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_refused(index):
  with pytest.raises(IndexError, match=rf"index {index} is outside 0\.\.2 of toy"):
    _source().image(index)


@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (np.zeros((3, 4, 5), np.uint8), None, r"uint8 \[3, 4, 5\]; uint8 \[N, H, W, C\]"),
    (np.zeros((3, 4, 5, 2), np.uint8), None, r"with 1, 3 or 4 channels"),
    (np.zeros((3, 4, 5, 3)), None, r"float64 \[3, 4, 5, 3\]"),
    (np.zeros((0, 4, 5, 3), np.uint8), np.zeros(0, int), r"images of toy are empty"),
    (None, np.zeros(2, int), r"labels of toy have shape \[2\]; \[3\]"),
    (None, np.zeros(3), r"labels are float64 \(toy, image 0\); integers"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(images, labels, message):
  with pytest.raises(ValueError, match=message):
    _source(images, labels)


def test_labels_out_of_range_name_the_first_and_count_all():
  where = lambda i: f"row {i}"
  labels = np.array([0, 9, 10, -1])
  assert check_labels(labels[:2], None, where) == 10
  assert check_labels(labels[:2], 12, where) == 12
  with pytest.raises(ValueError, match=r"label 10 of row 2 .* 0\.\.9 .* \(2 such labels in all\)"):
    check_labels(labels, 10, where)
  with pytest.raises(ValueError, match=r"label -1 of row 3 is out of range"):
    check_labels(labels, None, where)
  with pytest.raises(ValueError, match="num_classes is 0"):
    check_labels(labels, 0, where)


def test_digits_split_is_fixed_stratified_and_disjoint():
  train, test = data.open_source("digits"), data.open_source("digits", "test")
  assert (len(train), len(test)) == (1352, 445)
  assert train.num_classes == test.num_classes == 10
  counts = np.stack([np.bincount(s.labels, minlength=10) for s in (train, test)])
  # A quarter of each class, rounded down.
  np.testing.assert_array_equal(counts[1], counts.sum(axis=0) // 4)
  first = [np.asarray(s.image(0)) for s in (train, test)]
  assert first[0].shape == (8, 8) and first[0].dtype == np.uint8
  # Row 0 of scikit-learn's first digit is 0 0 5 13 9 1 0 0 on the scale 0..16.
  np.testing.assert_array_equal(first[0][0], [0, 0, 80, 207, 143, 16, 0, 0])
  assert train.labels[:6].tolist() == [0, 1, 2, 3, 4, 5]
  # scikit-learn's digits hold no image twice, so a shared one would be a leak.
  pixels = [{np.asarray(s.image(i)).tobytes() for i in range(len(s))} for s in (train, test)]
  assert not pixels[0] & pixels[1]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("cifar11",), r"dataset 'cifar11' is unknown; did you mean 'cifar10'\?.*accepted: cifar10,"),
    (("digits", "validation"), r"split 'validation' is unknown; .*accepted: test, train"),
    (("folder",), r"dataset 'folder' needs root"),
    (("npz",), r"dataset 'npz' needs root"),
  ],
)
def test_wrong_names_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.open_source(*arguments)


def test_digits_take_no_root_and_no_fewer_classes():
  with pytest.raises(ValueError, match="root is 'here', but dataset 'digits' is embedded"):
    data.open_source("digits", root="here")
  with pytest.raises(ValueError, match=r"0\.\.4 is accepted for 5 classes"):
    data.open_source("digits", num_classes=5)


def test_paths_expand_variables_and_report_unset_ones(monkeypatch, tmp_path):
  monkeypatch.setenv("SOME_DATA", str(tmp_path))
  monkeypatch.delenv("NO_DATA", raising=False)
  assert data.expand_path("$SOME_DATA/a") == tmp_path / "a"
  assert data.expand_path("${SOME_DATA}/a") == tmp_path / "a"
  for path in ("$NO_DATA/a", "${NO_DATA}/a"):
    with pytest.raises(ValueError, match="environment variable NO_DATA, which is not set"):
      data.expand_path(path)


@pytest.mark.parametrize("name", ["folder", "cifar10", "cifar100", "imagenet"])
def test_a_missing_root_is_named(tmp_path, name):
  with pytest.raises(
    FileNotFoundError, match=rf"dataset '{name}': folder .*nowhere does not exist"
  ):
    data.open_source(name, root=tmp_path / "nowhere")
  (tmp_path / "file").write_text("x")
  with pytest.raises(FileNotFoundError, match=r"file is a file"):
    data.open_source(name, root=tmp_path / "file")
