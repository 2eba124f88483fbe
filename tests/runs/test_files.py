"""Atomic files and plain values."""

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


def test_read_json_refuses_other_things(tmp_path):
  for text in ("[1]", "{", ""):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json is no JSON object"):
      files.read_json(tmp_path / "a.json")
