"""Datasets of tensorflow-datasets: read without TensorFlow, missing ones explained at once."""

import io
import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from flexiq_jax import data


def _png(pixels):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "PNG")
  stream.seek(0)
  return stream  # encoded already: encoding pixels itself would need TensorFlow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data directory with a tiny `cifar10`, written by tensorflow-datasets; and its images."""
  import tensorflow_datasets as tfds

  pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)

  class Cifar10(tfds.core.GeneratorBasedBuilder):
    # tensorflow-datasets looks for files beside a builder that comes from a package.
    __module__ = "__main__"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(0, 16), "test": self._generate_examples(16, 24)}

    def _generate_examples(self, start, stop):
      for i in range(start, stop):
        yield i, {"image": _png(pixels[i]), "label": i % 10}

  root = tmp_path_factory.mktemp("tfds")
  tfds.display_progress_bar(False)
  Cifar10(data_dir=root, file_format="array_record").download_and_prepare()
  return root, pixels


def test_records_are_read_without_tensorflow(prepared):
  root, pixels = prepared
  for split, members in (("train", range(16)), ("test", range(16, 24))):
    source = data.open_source("cifar10", split, root=root)
    assert len(source) == len(members) and source.num_classes == 10 and source.labels_are_cheap
    # The writer shuffles; images are matched with their own labels through their pixels.
    label_of = {pixels[i].tobytes(): i % 10 for i in members}
    items = [source.item(i) for i in range(len(source))]
    assert sorted(label_of) == sorted(np.asarray(image).tobytes() for image, _ in items)
    for i, (image, label) in enumerate(items):
      assert label == label_of[np.asarray(image).tobytes()] == source.labels[i]
  assert "tensorflow" not in sys.modules


def test_splits_are_separate_and_batches_come_through(prepared):
  root, _ = prepared
  train, test = (data.open_source("cifar10", s, root=root) for s in ("train", "test"))
  data.require_separate(train, test)
  got = list(data.batches(test, data.Preprocess(), 5))
  assert [b.mask.sum() for b in got] == [5, 3] and got[0].images.shape == (5, 32, 32, 3)


def test_the_newest_version_is_read(prepared, tmp_path):
  root, _ = prepared
  (tmp_path / "cifar10").mkdir()
  (tmp_path / "cifar10" / "3.0.2").symlink_to(root / "cifar10" / "3.0.2")
  # 3.0.10 is newer than 3.0.2 as a version, not as a string; tfrecord cannot be read at random.
  for version, kind in (("3.0.10", "array_record"), ("4.0.0", "tfrecord")):
    folder = tmp_path / "cifar10" / version
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": kind}))
  from flexiq_jax.data import prepared as module

  assert module._prepared_version(tmp_path, "cifar10") == tmp_path / "cifar10" / "3.0.10"
  assert module._prepared_version(tmp_path, "cifar100") is None


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("cifar10", ["tfds.builder('cifar10'"]),
    ("cifar100", ["tfds.builder('cifar100'"]),
    (
      "imagenet",
      [
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
        "downloads/manual",
        "tfds.builder('imagenet2012'",
      ],
    ),
  ],
)
def test_a_missing_dataset_is_explained_within_a_second(tmp_path, monkeypatch, name, parts):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  start = time.monotonic()
  with pytest.raises(FileNotFoundError) as caught:
    data.open_source(name)
  assert time.monotonic() - start < 1
  message = str(caught.value)
  for part in (
    f"dataset '{name}' is not prepared",
    str(tmp_path),
    "pip install tensorflow",
    *parts,
  ):
    assert part in message
  assert "\n" not in message


def test_too_few_classes_are_refused(prepared):
  with pytest.raises(ValueError, match=r"num_classes is 9; cifar10 has labels 0\.\.9"):
    data.open_source("cifar10", root=prepared[0], num_classes=9)
