"""Datasets that are arrays: scikit-learn's digits, `.npz` files and the lossless CIFAR-10 tiles.

digits   1,797 handwritten digits of 8x8 pixels in 17 grey levels, embedded in scikit-learn
         (https://archive.ics.uci.edu/dataset/80): no download, the default of the demo.
npz      any arrays of the user. Uncompressed files (np.savez) are memory-mapped; a compressed
         file is decompressed into memory as a whole, which NumPy's format leaves no way around.
tiles    CIFAR-10 (Krizhevsky 2009) as six lossless WebP sheets of 100x100 tiles. A sheet is decoded
         when one of its images is first asked for and then kept: 30 MB each, 150 MB for train.
"""

import functools
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flexiq_jax.data.source import ArraySource, LabelledSource, check_labels, decode, expand_path

# Arrays in an .npz for a split, in the order in which they are looked for.
_NPZ_KEYS = {
  "train": (("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")),
  "test": (("x_test", "y_test"), ("test_images", "test_labels"), ("images", "labels")),
}
_TILE_SHEETS = {
  "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
  "test": ("test_batch",),
}
_TILES = 100  # tiles along each side of a sheet
_TILE = 32  # pixels along each side of a tile
# Every fourth digit of each class is a test image. The rule needs no random numbers, so the split
# stays the same under every NumPy.
_DIGITS_TEST_EVERY = 4


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images uint8 [1797, 8, 8, 1], labels int32 [1797], and which are test images, bool [1797]."""
  from sklearn.datasets import load_digits  # takes a second to import, so only on demand

  data: Any = load_digits()
  # Grey levels 0..16 to 0..255, so that a digit is an ordinary 8-bit image.
  images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = data.target.astype(np.int32)
  rank = np.zeros(len(labels), np.int64)
  for c in range(10):
    members = np.flatnonzero(labels == c)
    rank[members] = np.arange(len(members))
  return images, labels, rank % _DIGITS_TEST_EVERY == _DIGITS_TEST_EVERY - 1


def open_digits(split: str, *, num_classes: int | None = None) -> ArraySource:
  """The embedded digits: 1,352 train and 445 test images, 8x8, one channel, ten classes."""
  images, labels, is_test = _digits()
  chosen = is_test if split == "test" else ~is_test
  return ArraySource(
    images[chosen],
    labels[chosen],
    name="digits",
    split=split,
    num_classes=10 if num_classes is None else num_classes,
    identity=("digits", split),
  )


def open_npz(path: str, split: str, *, num_classes: int | None = None) -> ArraySource:
  """Opens an `.npz` file.

  Args:
    path: the file. It holds `x_train`, `y_train`, `x_test`, `y_test`, or `train_images`,
      `train_labels` and so on, or, without splits, `images` and `labels`. Images are uint8
      [N, H, W, C] or [N, H, W]; labels integers [N] or [N, 1].
    split: `train` or `test`; a file without splits gives the same images for both.
    num_classes: number of classes; None takes the greatest label + 1.

  Returns:
    The source; its name is `npz`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no .npz, an array is missing, or has a wrong shape or dtype.
  """
  file = expand_path(path)
  if not file.is_file():
    kind = "is a folder; the .npz file itself is accepted" if file.is_dir() else "does not exist"
    raise FileNotFoundError(f"root of dataset 'npz': {file} {kind}")
  file = file.resolve()
  keys = _npz_keys(file)
  pair = next((p for p in _NPZ_KEYS[split] if p[0] in keys and p[1] in keys), None)
  if pair is None:
    wanted = ", or ".join(f"{x} and {y}" for x, y in _NPZ_KEYS[split])
    raise ValueError(
      f"{file} holds the arrays {', '.join(sorted(keys)) or '(none)'}; "
      f"for split '{split}' {wanted} is accepted"
    )
  images, labels = _npz_array(file, pair[0]), _npz_array(file, pair[1])
  if images.ndim == 3:
    images = images[..., None]
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  has_splits = pair != ("images", "labels")
  source = ArraySource(
    images,
    labels,
    name=f"{pair[0]} and {pair[1]} in {file}",
    split=split,
    num_classes=num_classes,
    identity=("npz", str(file), split if has_splits else "all"),
  )
  source.name = "npz"
  return source


def _npz_keys(file: Path) -> set[str]:
  try:
    with zipfile.ZipFile(file) as archive:
      return {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
  except (zipfile.BadZipFile, OSError) as error:
    raise ValueError(
      f"{file} is no .npz file (a zip of .npy arrays, as np.savez writes): {error}"
    ) from error


def _npz_array(file: Path, key: str) -> np.ndarray:
  """An array of an .npz: memory-mapped where it is stored uncompressed, else loaded."""
  with zipfile.ZipFile(file) as archive:
    info = archive.getinfo(f"{key}.npy")
  try:
    if info.compress_type == zipfile.ZIP_STORED:
      with file.open("rb") as stream:
        # The data follows a local header of 30 bytes, the name and an extra field; their lengths
        # stand in the header (APPNOTE.TXT 4.3.7). The central directory's may differ.
        stream.seek(info.header_offset + 26)
        sizes = stream.read(4)
        name, extra = int.from_bytes(sizes[:2], "little"), int.from_bytes(sizes[2:], "little")
        stream.seek(info.header_offset + 30 + name + extra)
        if np.lib.format.read_magic(stream) == (1, 0):
          shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
          if any(n < 0 for n in shape):
            raise ValueError(f"its header says shape {list(shape)}")
          if not dtype.hasobject and 0 not in shape and shape:
            order = "F" if fortran else "C"
            return np.memmap(file, dtype, "r", stream.tell(), shape, order)
    with np.load(file, allow_pickle=False) as archive:
      return archive[key]
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"array {key} of {file} cannot be read: {error}") from error


class TileSource(LabelledSource):
  """CIFAR-10 from lossless sheets of tiles."""

  def __init__(self, root: Path, split: str, *, num_classes: int | None = None):
    """Opens the sheets' labels; no sheet is decoded yet.

    Args:
      root: resolved folder with `labels.npz` and `data_batch_1..5.webp`, `test_batch.webp`.
      split: `train` or `test`.
      num_classes: number of classes; None is 10.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the labels do not fit.
    """
    sheets = _TILE_SHEETS[split]
    self._files = [root / f"{sheet}.webp" for sheet in sheets]
    for file in (root / "labels.npz", *self._files):
      if not file.is_file():
        raise FileNotFoundError(f"CIFAR-10 tiles in {root}: {file.name} is missing")
    keys = _npz_keys(root / "labels.npz")
    if missing := [sheet for sheet in sheets if sheet not in keys]:
      raise ValueError(f"{root / 'labels.npz'} has no array {missing[0]}; it holds {sorted(keys)}")
    labels = [_npz_array(root / "labels.npz", sheet) for sheet in sheets]
    for sheet, array in zip(sheets, labels, strict=True):
      if array.shape != (_TILES * _TILES,):
        raise ValueError(
          f"array {sheet} of {root / 'labels.npz'} has shape {list(array.shape)}; "
          f"[{_TILES * _TILES}] is accepted"
        )
    joined = np.concatenate(labels).astype(np.int32)
    classes = check_labels(
      joined, 10 if num_classes is None else num_classes, lambda i: f"{root}, image {i}"
    )
    super().__init__("cifar10", split, classes, ("tiles", str(root), split), joined)
    self._sheets: list[np.ndarray | None] = [None] * len(sheets)
    self._lock = threading.Lock()

  def _sheet(self, number: int) -> np.ndarray:
    """Sheet `number` as uint8 [100, 32, 100, 32, 3] (row, y, column, x, channel)."""
    with self._lock:  # one thread decodes, the others wait for it
      sheet = self._sheets[number]
      if sheet is None:
        file = self._files[number]
        image = decode(lambda: Image.open(file), str(file))
        side = _TILES * _TILE
        if image.size != (side, side):
          raise ValueError(
            f"{file} has {image.width}x{image.height} pixels; {side}x{side} is accepted"
          )
        pixels = np.asarray(image.convert("RGB"))
        sheet = self._sheets[number] = pixels.reshape(_TILES, _TILE, _TILES, _TILE, 3)
      return sheet

  def _read(self, index: int) -> tuple[Image.Image, int]:
    number, tile = divmod(index, _TILES * _TILES)
    row, column = divmod(tile, _TILES)
    pixels = np.ascontiguousarray(self._sheet(number)[row, :, column])
    return Image.fromarray(pixels), int(self._labels[index])
