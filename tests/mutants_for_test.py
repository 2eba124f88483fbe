"""JSON documents with something wrong in them, for everything that reads one."""

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

# How many for one kind of file: in every run, and of two kinds ten thousand.
MUTANTS = (500, pytest.param(5000, marks=pytest.mark.slow))
_VALUES = (None, True, -1, 0, 2**31, 10**12, 10**40, 0.5, 1e308, "", "../../x", "a#1", [], [[]], {})


def places(value, path=()):
  """Where a document can be changed."""
  yield path
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, item in items:
    if isinstance(item, dict | list):
      yield from places(item, (*path, key))
    else:
      yield (*path, key)


def mutant(document, rng):
  """The document with one to three values replaced, dropped, doubled or renamed."""
  made = json.loads(json.dumps(document))
  for _ in range(rng.integers(1, 4)):
    every = [place for place in places(made) if place]
    *front, last = every[rng.integers(len(every))]
    inside = made
    for key in front:
      inside = inside[key]
    what = rng.integers(4)
    if what == 0 and isinstance(inside, list):
      inside.append(inside[last])
    elif what == 1:
      del inside[last]
    elif what == 2 and isinstance(inside, dict):
      inside[f"{last}_"] = inside.pop(last)
    else:
      inside[last] = _VALUES[rng.integers(len(_VALUES))]
  return made


def mutants_are_told(
  document: Any, read: Callable[[Any], Any], count: int, *, starts: str, most: int = 2**24
) -> None:
  """Has mutants of a document read: each is taken or refused by name, at once and in little memory.

  Args:
    document: what is mutated.
    read: reads a mutant; ValueErrors are refusals.
    count: how many.
    starts: how the message of a refusal begins.
    most: bytes that may be allocated beyond what was before.
  """
  rng = np.random.default_rng(0)
  tracemalloc.start()
  try:
    for _ in range(count):
      made, began = mutant(document, rng), time.process_time()
      tracemalloc.reset_peak()
      before = tracemalloc.get_traced_memory()[0]
      try:
        read(made)
      except ValueError as error:
        assert str(error).startswith(starts) and len(str(error)) > len(starts)
      assert time.process_time() - began < 1
      assert tracemalloc.get_traced_memory()[1] - before < most
  finally:
    tracemalloc.stop()
