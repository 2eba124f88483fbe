"""What every dataset looks like to the rest of the code: `Source`, images decoded on demand.

A source knows its length and its labels and decodes image i when asked, so that memory does not
grow with the dataset. It neither resizes nor normalises (preprocess.py) nor batches (loading.py).

| name          | meaning                                                                       |
| ------------- | ----------------------------------------------------------------------------- |
| `name`        | registry name of the dataset, as `cifar10`                                    |
| `split`       | `train` or `test`                                                             |
| `identity`    | which files of which split are read; equal identities are the same images     |
| `num_classes` | labels are 0..num_classes - 1                                                 |
"""

import abc
import difflib
import numbers
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "test")


def is_integer(value: object) -> bool:
  """Whether a value is a Python or NumPy integer; True and False are not."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class Source(abc.ABC):
  """A labelled set of images, decoded one at a time.

  Reading is thread-safe: loading.py calls `item` from several threads.

  Attributes:
    name: registry name of the dataset.
    split: `train` or `test`.
    num_classes: number of classes; every label is below it.
    identity: strings that name the files and the split; see draws.require_separate.
    labels_are_cheap: whether `labels` comes without reading the images too.
  """

  labels_are_cheap = True

  def __init__(self, name: str, split: str, num_classes: int, identity: Sequence[str]):
    self.name = name
    self.split = split
    self.num_classes = num_classes
    self.identity = tuple(identity)

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @property
  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """All labels, int32 [N]."""

  @abc.abstractmethod
  def _read(self, index: int) -> tuple[Image.Image, int]: ...

  def item(self, index: int) -> tuple[Image.Image, int]:
    """Decodes one example.

    Args:
      index: position in 0..N - 1.

    Returns:
      The image as stored (8 bits a channel, any Pillow mode and size) and its label.

    Raises:
      IndexError: index is outside 0..N - 1.
      ValueError: the image does not decode.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside 0..{len(self) - 1} of {self}")
    return self._read(index)

  def image(self, index: int) -> Image.Image:
    """The image of `item`."""
    return self.item(index)[0]

  def __str__(self) -> str:
    return f"{self.name} ({self.split}, {len(self)} images)"


class LabelledSource(Source):
  """A source that has its labels in memory."""

  def __init__(
    self, name: str, split: str, num_classes: int, identity: Sequence[str], labels: np.ndarray
  ):
    super().__init__(name, split, num_classes, identity)
    self._labels = labels.astype(np.int32)

  def __len__(self) -> int:
    return len(self._labels)

  @property
  def labels(self) -> np.ndarray:
    return self._labels


class ArraySource(LabelledSource):
  """A source over arrays that are in memory or memory-mapped."""

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str,
    split: str,
    num_classes: int | None = None,
    identity: Sequence[str],
  ):
    """Wraps arrays.

    Args:
      images: uint8 [N, H, W, C] with 1, 3 or 4 channels (grey, RGB, RGBA), N >= 1.
      labels: integers [N].
      name: registry name, or the file the arrays come from.
      split: `train` or `test`.
      num_classes: number of classes; None takes the greatest label + 1.
      identity: see `Source`.

    Raises:
      ValueError: a shape, a dtype or a label does not fit.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3, 4):
      raise ValueError(
        f"images of {name} are {images.dtype} {list(images.shape)}; "
        "uint8 [N, H, W, C] with 1, 3 or 4 channels is accepted"
      )
    if not images.size:
      raise ValueError(f"images of {name} are empty: shape {list(images.shape)}")
    if labels.shape != images.shape[:1]:
      raise ValueError(
        f"labels of {name} have shape {list(labels.shape)}; "
        f"[{len(images)}], one for each image, is accepted"
      )
    num_classes = check_labels(labels, num_classes, lambda i: f"{name}, image {i}")
    super().__init__(name, split, num_classes, identity, labels)
    self._images = images

  def _read(self, index: int) -> tuple[Image.Image, int]:
    pixels = np.ascontiguousarray(self._images[index])
    if pixels.shape[-1] == 1:
      pixels = pixels[..., 0]
    return Image.fromarray(pixels), int(self._labels[index])


def check_labels(labels: np.ndarray, num_classes: int | None, where: Callable[[int], str]) -> int:
  """Checks labels against the number of classes.

  Args:
    labels: array [N], N >= 1.
    num_classes: number of classes, or None for the greatest label + 1.
    where: says in words where label i comes from, for the message.

  Returns:
    The number of classes.

  Raises:
    ValueError: labels are no integers, or one is outside 0..num_classes - 1.
  """
  if num_classes is not None and num_classes < 1:
    raise ValueError(f"num_classes is {num_classes}; a positive integer or None is accepted")
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f"labels are {labels.dtype} ({where(0)}); integers are accepted")
  if num_classes is None:
    num_classes = max(int(labels.max()), 0) + 1
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    first = int(wrong[0])
    more = f" ({wrong.size} such labels in all)" if wrong.size > 1 else ""
    raise ValueError(
      f"label {labels[first]} of {where(first)} is out of range: "
      f"0..{num_classes - 1} is accepted for {num_classes} classes{more}"
    )
  return num_classes


def decode(opened: Callable[[], Image.Image], what: str) -> Image.Image:
  """Opens and decodes an image now, so that a broken file is named here.

  Args:
    opened: opens the image; Pillow itself decodes lazily.
    what: the file or record, for the message.

  Returns:
    The decoded image.

  Raises:
    ValueError: the bytes are no image Pillow can read, or are cut short.
  """
  try:
    image = opened()
    image.load()
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    # Pillow reports broken files with any of these, depending on the format.
    raise ValueError(f"{what} does not decode as an image: {error}") from error
  return image


def expand_path(path: str | os.PathLike[str]) -> Path:
  """Expands `~` and environment variables, as in `$FLEXIQ_DATA/cifar10`.

  Args:
    path: the path as a user wrote it.

  Returns:
    The path, not checked for existence.

  Raises:
    ValueError: a variable in the path is not set.
  """
  text = os.path.expandvars(os.fspath(path))
  unset = re.search(r"\$(?:\{(\w+)\}|(\w+))", text)
  if unset:
    variable = unset.group(1) or unset.group(2)
    raise ValueError(
      f"path '{os.fspath(path)}' uses the environment variable {variable}, which is not set; "
      f"set it (export {variable}=...) or give the path in full"
    )
  return Path(text).expanduser()


def existing_folder(root: str | os.PathLike[str] | None, name: str) -> Path:
  """The folder of a dataset, expanded, resolved and known to exist.

  Args:
    root: the folder as a user wrote it.
    name: the dataset, for the message.

  Returns:
    The resolved path.

  Raises:
    ValueError: root is None or an environment variable is unset.
    FileNotFoundError: there is no such folder.
  """
  if root is None:
    raise ValueError(f"dataset '{name}' needs root, the path of its data; root is None")
  folder = expand_path(root)
  if not folder.is_dir():
    kind = "is a file" if folder.exists() else "does not exist"
    raise FileNotFoundError(f"root of dataset '{name}': folder {folder} {kind}")
  return folder.resolve()


def did_you_mean(value: str, accepted: Iterable[str]) -> str:
  """The end of a message about a wrong name: the closest name, then all of them."""
  accepted = sorted(accepted)
  close = difflib.get_close_matches(value, accepted, n=1, cutoff=0.5)
  hint = f"did you mean '{close[0]}'? " if close else ""
  return f"{hint}accepted: {', '.join(accepted)}"
