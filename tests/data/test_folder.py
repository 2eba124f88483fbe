"""A folder of images with a labels.csv, and every way in which it can be wrong."""

import numpy as np
import pytest
from PIL import Image

from flexiq_jax import data


def _save(path, seed=0, size=(6, 4), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
  Image.fromarray(pixels).convert(mode).save(path)
  return pixels


def _table(root, text):
  root.mkdir(parents=True, exist_ok=True)
  (root / "labels.csv").write_text(text, encoding="utf-8")


def test_files_beside_the_table_and_below_images(tmp_path):
  beside = _save(tmp_path / "a.png", 1)
  below = _save(tmp_path / "images" / "b.png", 2)
  # A byte-order mark, columns in another order, one column more, a comma inside quotes.
  _table(tmp_path, '\ufefflabel,file,note\n3,a.png,"x, y"\n0,b.png,\n')
  source = data.open_source("folder", root=tmp_path)
  assert source.labels.tolist() == [3, 0] and source.num_classes == 4 and len(source) == 2
  for i, pixels in enumerate((beside, below)):
    np.testing.assert_array_equal(np.asarray(source.image(i)), pixels)
  assert data.open_source("folder", root=tmp_path, num_classes=9).num_classes == 9


def test_train_and_test_subfolders_are_splits(tmp_path):
  for split in ("train", "test"):
    _save(tmp_path / split / f"{split}.png")
    _table(tmp_path / split, f"file,label\n{split}.png,0\n")
  train, test = (data.open_source("folder", s, root=tmp_path) for s in ("train", "test"))
  data.require_separate(train, test)
  with pytest.raises(ValueError, match="both read folder"):
    data.require_separate(test, data.open_source("folder", root=tmp_path / "test"))


def test_a_folder_without_splits_is_the_same_data_whatever_its_path(tmp_path):
  _save(tmp_path / "real" / "a.png")
  _table(tmp_path / "real", "file,label\na.png,0\n")
  (tmp_path / "link").symlink_to(tmp_path / "real")
  train = data.open_source("folder", "train", root=tmp_path / "real")
  test = data.open_source("folder", "test", root=tmp_path / "link")
  with pytest.raises(ValueError, match="give calibration another split or root"):
    data.require_separate(train, test)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("name,label\na.png,0\n", r"labels\.csv has no column 'file'; it has name, label"),
    ("file,class\na.png,0\n", r"labels\.csv has no column 'label'; it has file, class"),
    ("", r"labels\.csv has no column 'file'; it has none"),
    ("file,label\n", r"labels\.csv lists no image"),
    ("file,label\na.png,cat\n", r"line 2: label 'cat' of a\.png is no integer"),
    ("file,label\na.png\n", r"line 2: label 'None' of a\.png is no integer"),
    ("file,label\n,3\n", r"line 2: column 'file' is empty"),
    ("file,label\na.png,1\n\na.png,2\n", r"line 4: a\.png is already listed in line 2"),
    (
      "file,label\na.png,10\n",
      r"label 10 of a\.png \(.*labels\.csv, line 2\) is out of range: 0..9",
    ),
    ("file,label\na.png,9999999999999999999999\n", r"line 2: label 9+ of a\.png has more than 64"),
    ('file,label\n"a.png,1\n', r"labels\.csv, line 2: unexpected end of data; is a quotation mark"),
    ("file,label,more\na.png,1," + "x" * 200_000 + "\n", r"line 2: field larger than field limit"),
    ("file,label\na.png,-1\n", r"label -1 of a\.png \(.*labels\.csv, line 2\)"),
  ],
)
def test_a_wrong_table_is_refused(tmp_path, text, message):
  _save(tmp_path / "a.png")
  _table(tmp_path, text)
  with pytest.raises(ValueError, match=message):
    data.open_source("folder", root=tmp_path, num_classes=10)


def test_a_table_in_another_encoding_is_refused(tmp_path):
  _save(tmp_path / "a.png")
  (tmp_path / "labels.csv").write_bytes("file,label\na.png,0\né.png,1\n".encode("latin-1"))
  with pytest.raises(ValueError, match=r"labels\.csv, line 3 or later: not UTF-8 .*save it as"):
    data.open_source("folder", root=tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="is empty"):
    data.open_source("folder", root=tmp_path)
  _save(tmp_path / "a.png")
  with pytest.raises(FileNotFoundError, match=r"has no labels\.csv with the columns file,label"):
    data.open_source("folder", root=tmp_path)
  _table(tmp_path, "file,label\na.png,0\ngone.png,0\n")
  with pytest.raises(FileNotFoundError, match=r"labels\.csv, line 3: file gone\.png is neither in"):
    data.open_source("folder", root=tmp_path)
  _table(tmp_path, "file,label\na.png,0\n")
  source = data.open_source("folder", root=tmp_path)
  (tmp_path / "a.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"a\.png has been removed since"):
    source.image(0)


@pytest.mark.parametrize("kind", ["text", "cut short", "empty"])
def test_an_image_that_does_not_decode_is_named(tmp_path, kind):
  file = tmp_path / "a.png"
  _save(file, size=(64, 64))
  content = {"text": b"hello", "cut short": file.read_bytes()[:2000], "empty": b""}[kind]
  file.write_bytes(content)
  _table(tmp_path, "file,label\na.png,0\n")
  source = data.open_source("folder", root=tmp_path)
  with pytest.raises(ValueError, match=r"image .*a\.png does not decode as an image"):
    source.image(0)


@pytest.mark.data
def test_real_folder(flexiq_data):
  source = data.open_source("folder", "test", root="$FLEXIQ_DATA/nips2017_dev500", num_classes=1000)
  assert len(source) == 500 and source.image(499).size == (256, 256)
  assert source.labels.min() >= 0 and source.labels.max() <= 999
