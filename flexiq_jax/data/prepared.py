"""CIFAR-10, CIFAR-100 and ImageNet-2012 through tensorflow-datasets, without TensorFlow.

A dataset that is prepared once as `array_record` gives random access to its records, and with
`SkipDecoding` the encoded bytes of the image, which Pillow decodes here. Only that one *prepare*
step needs TensorFlow (https://www.tensorflow.org/datasets/data_source). The prepared folder is
looked up on disk, not through the dataset's builder class: a missing dataset is reported at once,
without a look at the network.
"""

import functools
import importlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flexiq_jax.data.source import Source, check_labels, decode, expand_path

# Name here -> name in tensorflow-datasets and number of classes.
DATASETS = {
  "cifar10": ("cifar10", 10),
  "cifar100": ("cifar100", 100),
  "imagenet": ("imagenet2012", 1000),
}
# ImageNet's own test labels are secret: the field's "test" is the validation set.
_SPLITS = {("imagenet", "test"): "validation"}
_DEFAULT_ROOT = "~/tensorflow_datasets"
# Reading the labels of more records than this means gigabytes of images (ImageNet).
_CHEAP_LABELS = 100_000
_CHUNK = 1024  # records read at once while collecting labels


class PreparedSource(Source):
  """A split of a dataset that tensorflow-datasets has prepared as array_record."""

  def __init__(
    self,
    name: str,
    split: str,
    *,
    root: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
  ):
    """Opens a prepared dataset.

    Args:
      name: a key of `DATASETS`.
      split: `train` or `test` (ImageNet: the validation set).
      root: the data directory of tensorflow-datasets; None is the environment variable
        TFDS_DATA_DIR or ~/tensorflow_datasets.
      num_classes: number of classes; None takes the dataset's.

    Raises:
      FileNotFoundError: the dataset is not prepared there; the message says how to do it.
      ValueError: num_classes is below the dataset's.
    """
    dataset, classes = DATASETS[name]
    data_dir = expand_path(root or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_ROOT)
    version = _prepared_version(data_dir, dataset)
    if version is None:
      raise FileNotFoundError(_how_to_prepare(name, data_dir))
    if num_classes is not None and num_classes < classes:
      raise ValueError(
        f"num_classes is {num_classes}; {name} has labels 0..{classes - 1}, "
        f"so {classes} or more is accepted"
      )
    super().__init__(
      name, split, num_classes or classes, ("tensorflow_datasets", str(version), split)
    )
    tfds = importlib.import_module("tensorflow_datasets")
    self._records: Any = tfds.builder_from_directory(version).as_data_source(
      split=_SPLITS.get((name, split), split),
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    self.labels_are_cheap = len(self._records) <= _CHEAP_LABELS

  def __len__(self) -> int:
    return len(self._records)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """All labels, int32 [N]; reads every record once, which for ImageNet is slow."""
    labels = np.empty(len(self), np.int32)
    for start in range(0, len(self), _CHUNK):
      rows = range(start, min(start + _CHUNK, len(self)))
      labels[rows] = [record["label"] for record in self._records.__getitems__(list(rows))]
    check_labels(labels, self.num_classes, lambda i: f"{self.name}, record {i}")
    return labels

  def _read(self, index: int) -> tuple[Image.Image, int]:
    record = self._records[index]
    stream = io.BytesIO(record["image"])
    return decode(lambda: Image.open(stream), f"{self.name}, record {index}"), int(record["label"])


def _prepared_version(data_dir: Path, dataset: str) -> Path | None:
  """The newest version folder of a dataset that holds array_record files, if any."""
  found = []
  for info in (data_dir / dataset).glob("*/dataset_info.json"):
    fields = json.loads(info.read_text(encoding="utf-8"))
    version = info.parent.name.split(".")
    if fields.get("fileFormat") == "array_record" and all(part.isdigit() for part in version):
      found.append((tuple(int(part) for part in version), info.parent.resolve()))
  return max(found)[1] if found else None


def _how_to_prepare(name: str, data_dir: Path) -> str:
  """One message with the exact steps to get a dataset.

  importlib_resources is imported by tensorflow-datasets 4.9 while preparing, but not among its
  requirements.
  """
  dataset, _ = DATASETS[name]
  manual = ""
  if name == "imagenet":
    manual = (
      "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (account on "
      f"https://image-net.org) into {data_dir / 'downloads' / 'manual'}, then "
    )
  return (
    f"dataset '{name}' is not prepared as array_record under {data_dir}. To get it once: {manual}"
    "run `pip install tensorflow importlib_resources` and "
    '`python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{dataset}', data_dir='{data_dir}', file_format='array_record')"
    '.download_and_prepare()"` (only this step needs TensorFlow), '
    "or give root, the folder where it is prepared"
  )
