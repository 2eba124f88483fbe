"""A folder of images with a `labels.csv`: the simplest way to bring one's own data.

  root/labels.csv        columns `file` and `label` (0, 1, ...); more columns are ignored
  root/images/...        the files, or right beside labels.csv

A root with `train/` and `test/`, each of them laid out like this, has splits; any other root gives
the same images for both splits, and its `identity` says so.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from flexiq_jax.data.source import LabelledSource, check_labels, decode, existing_folder

_COLUMNS = ("file", "label")


class FolderSource(LabelledSource):
  """Images of a folder, decoded from their files one at a time."""

  def __init__(
    self, root: str | os.PathLike[str] | None, split: str, *, num_classes: int | None = None
  ):
    """Reads labels.csv and checks that every file is there; decodes nothing yet.

    Args:
      root: the folder; may use environment variables.
      split: `train` or `test`.
      num_classes: number of classes; None takes the greatest label + 1.

    Raises:
      FileNotFoundError: the folder, labels.csv or a listed file is missing.
      ValueError: labels.csv has no such column, no row, or a label that does not fit.
    """
    folder = existing_folder(root, "folder")
    if (folder / split / "labels.csv").is_file():
      folder = folder / split
    table = folder / "labels.csv"
    if not table.is_file():
      if not any(folder.iterdir()):
        raise FileNotFoundError(f"root of dataset 'folder': folder {folder} is empty")
      raise FileNotFoundError(
        f"root of dataset 'folder': {folder} has no labels.csv with the columns file,label"
      )
    names, labels, lines = _read_table(table)
    self._files = [
      _find(folder, name, table, line) for name, line in zip(names, lines, strict=True)
    ]
    classes = check_labels(labels, num_classes, lambda i: f"{names[i]} ({table}, line {lines[i]})")
    super().__init__("folder", split, classes, ("folder", str(folder)), labels)

  def _read(self, index: int) -> tuple[Image.Image, int]:
    file = self._files[index]
    if not file.is_file():
      raise FileNotFoundError(f"image {file} has been removed since the folder was opened")
    # Opened here rather than by Pillow, which would leave a broken file open.
    with file.open("rb") as stream:
      return decode(lambda: Image.open(stream), f"image {file}"), int(self._labels[index])


def _read_table(table: Path) -> tuple[list[str], np.ndarray, list[int]]:
  """File names, labels int64 [N] and line numbers of a labels.csv."""
  try:
    return _rows(table)
  except UnicodeDecodeError as error:
    line = error.object.count(b"\n", 0, error.start) + 1
    raise ValueError(
      f"{table}, line {line} or later: not UTF-8 ({error.reason}); save it as UTF-8"
    ) from None


def _rows(table: Path) -> tuple[list[str], np.ndarray, list[int]]:
  names: list[str] = []
  labels: list[int] = []
  lines: list[int] = []
  seen: dict[str, int] = {}
  # utf-8-sig: spreadsheet programs write a byte-order mark, which would end up in the first name.
  with table.open(newline="", encoding="utf-8-sig") as stream:
    reader = csv.DictReader(stream, strict=True)
    columns = reader.fieldnames or []
    for column in _COLUMNS:
      if column not in columns:
        raise ValueError(
          f"{table} has no column '{column}'; it has {', '.join(columns) or 'none'}, "
          "and file,label are needed"
        )
    for row, line in _numbered(reader, table):
      name, label = row["file"], row["label"]
      if not name:
        raise ValueError(f"{table}, line {line}: column 'file' is empty")
      if name in seen:
        raise ValueError(f"{table}, line {line}: {name} is already listed in line {seen[name]}")
      try:
        labels.append(int(label))
      except (TypeError, ValueError):
        raise ValueError(f"{table}, line {line}: label '{label}' of {name} is no integer") from None
      if abs(labels[-1]) >= 2**63:
        raise ValueError(f"{table}, line {line}: label {label} of {name} has more than 64 bits")
      seen[name] = line
      names.append(name)
      lines.append(line)
  if not names:
    raise ValueError(f"{table} lists no image: it has no row below its header")
  return names, np.asarray(labels, np.int64), lines


def _numbered(reader: csv.DictReader, table: Path) -> Iterator[tuple[dict[str, str], int]]:
  """The rows with the line that each ends in."""
  while True:
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise ValueError(
        f"{table}, line {reader.line_num + 1}: {error}; is a quotation mark missing?"
      ) from None
    if row is None:
      return
    yield row, reader.line_num


def _find(folder: Path, name: str, table: Path, line: int) -> Path:
  for candidate in (folder / name, folder / "images" / name):
    if candidate.is_file():
      return candidate
  raise FileNotFoundError(
    f"{table}, line {line}: file {name} is neither in {folder} nor in {folder / 'images'}"
  )
