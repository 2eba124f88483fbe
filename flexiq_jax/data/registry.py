"""Opening a dataset by its name."""

import os

from flexiq_jax.data.arrays import TileSource, open_digits, open_npz
from flexiq_jax.data.distorted import open_distorted
from flexiq_jax.data.folder import FolderSource
from flexiq_jax.data.prepared import PreparedSource
from flexiq_jax.data.source import SPLITS, Source, did_you_mean, existing_folder

# Name -> what it reads, in words (for messages and for --help).
DATASETS = {
  "digits": "scikit-learn's 8x8 handwritten digits, embedded; no root",
  "distorted_digits": "the digits turned, moved, covered and noisy, embedded; no root",
  "cifar10": "CIFAR-10; root is a folder of lossless tiles or the tensorflow-datasets folder",
  "cifar100": "CIFAR-100 through tensorflow-datasets; root is its data directory",
  "imagenet": "ImageNet-2012 through tensorflow-datasets; root is its data directory",
  "folder": "images with a labels.csv; root is the folder",
  "npz": "arrays of images and labels; root is the .npz file",
}
_EMBEDDED = {"digits": open_digits, "distorted_digits": open_distorted}


def open_source(
  name: str,
  split: str = "train",
  *,
  root: str | os.PathLike[str] | None = None,
  num_classes: int | None = None,
) -> Source:
  """Opens a dataset.

  Args:
    name: a key of `DATASETS`.
    split: `train` or `test` (ImageNet: the validation set).
    root: where the data lies; may use environment variables, as `$FLEXIQ_DATA/cifar10`.
    num_classes: number of classes of the model that will see the labels; None takes the dataset's.

  Returns:
    The source. Its images are decoded on demand.

  Raises:
    FileNotFoundError: a folder or file is missing.
    ValueError: an argument, a path or the data itself is wrong.
  """
  if name not in DATASETS:
    raise ValueError(f"dataset '{name}' is unknown; {did_you_mean(name, DATASETS)}")
  if split not in SPLITS:
    raise ValueError(f"split '{split}' is unknown; {did_you_mean(split, SPLITS)}")
  if name in _EMBEDDED:
    if root is not None:
      raise ValueError(f"root is '{root}', but dataset '{name}' is embedded and takes no root")
    return _EMBEDDED[name](split, num_classes=num_classes)
  if name == "folder":
    return FolderSource(root, split, num_classes=num_classes)
  if name == "npz":
    if root is None:
      raise ValueError("dataset 'npz' needs root, the path of the .npz file; root is None")
    return open_npz(os.fspath(root), split, num_classes=num_classes)
  if root is not None:
    folder = existing_folder(root, name)
    if name == "cifar10" and (any(folder.glob("*.webp")) or (folder / "labels.npz").is_file()):
      return TileSource(folder, split, num_classes=num_classes)
  return PreparedSource(name, split, root=root, num_classes=num_classes)
