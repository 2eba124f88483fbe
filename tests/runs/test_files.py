"""Atomic files and plain values."""

import errno
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.runs import files


def test_text_is_replaced_and_readable_by_the_group(tmp_path):
  path = tmp_path / "a.txt"
  mask = os.umask(0o022)
  try:
    assert files.write_text(path, "é\n") == path
    files.write_text(path, "b\r\n")
  finally:
    os.umask(mask)
  assert path.read_bytes() == b"b\r\n"
  assert path.stat().st_mode & 0o777 == 0o644
  assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
  ("value", "plain"),
  [
    (np.float64(0.5), 0.5),
    (jnp.arange(2), [0, 1]),
    (np.bool_(True), True),
    ((1, (2, None)), [1, [2, None]]),
    ({1: pathlib.Path("a/b")}, {"1": "a/b"}),
    ({"b", "a"}, ["a", "b"]),
    (float("-inf"), "-inf"),
    (np.array([1.0, np.nan]), [1.0, "nan"]),
    (np.dtype("int8"), "int8"),
  ],
)
def test_to_plain(value, plain):
  result = files.to_plain(value)
  assert result == plain
  assert type(result) is type(plain)
  json.dumps(result, allow_nan=False)


def test_differences_name_the_fields():
  old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": {"f": 1}}
  new = {"a": 1.0, "b": {"c": [1, 3], "d": "x"}, "e": 5, "g": None}
  assert files.differences(old, new) == [
    ("b.c", "[1, 2]", "[1, 3]"),
    ("e", '{"f": 1}', "5"),
    ("g", "absent", "null"),
  ]


@given(st.recursive(st.integers() | st.none(), lambda x: st.dictionaries(st.text("ab"), x)))
def test_no_difference_to_itself(config):
  assert files.differences(config, config) == []


def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
    files.write_text(tmp_path / "a.txt", "text")
  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
    files.require_space(tmp_path, 1)
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(OSError, match=r"^x$"), files.named("path"):
    raise OSError("x")


def test_space_is_asked_for_and_given_back(tmp_path):
  files.require_space(tmp_path, 10_000)
  assert list(tmp_path.iterdir()) == []


def test_left_over_files_go_and_nothing_else(tmp_path):
  stay = ["a.json", ".lock", "search/3/tree", "train/12/x", "seed1/.results.csv." + 32 * "0"]
  stay += ["seed1/config.json", "x.partial", ".results.csv.old"]
  go = [f".results.csv.{32 * 'a'}", "recipe.json.part", "recipes/greedy.json.part"]
  go += ["train/2.orbax-checkpoint-tmp/tree/x", "train/2.incomplete-0/x"]
  for name in stay + go:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  files.remove_left_over(tmp_path)
  assert sorted(stay) == sorted(
    p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
  )
  assert [p.name for p in (tmp_path / "train").iterdir()] == ["12"]


def test_read_json_refuses_other_things(tmp_path):
  deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
  for text in ("[1]", "{", "", '{"a": 1, "a": 2}', deep):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json is no JSON object"):
      files.read_json(tmp_path / "a.json")
