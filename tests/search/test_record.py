"""What searches share: clock, steps, progress, checkpoints."""

import json
import types

import numpy as np
import pytest

from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import steps
from flexiq_jax.search.record import Record

TREE = {"a": np.arange(3.0)}


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def make(folder=None, clock=None, **options):
  fitness = types.SimpleNamespace(forwards=0.0)
  workdir = Workdir(folder) if folder else None
  options = {"method": "m", "seed": 3, "clock": clock or Clock(), **options}
  return Record(fitness, workdir=workdir, **options)


def step(record, number, **changes):
  record.step(number, **{"ratio": 0.5, "best": 1.0, "mean": 2.0, "stage": "s", **changes})


def test_limits_of_time_and_evaluations_are_shared():
  clock = Clock()
  record = make(clock=clock, max_minutes=2)
  clock.now += 59
  assert not record.over(0.5)
  clock.now += 1
  assert record.over(0.5)
  assert not record.over()
  assert record.seconds == 60
  assert make(clock=clock, max_minutes=2, seconds=120).over()
  clock.now += 10**9
  assert not make(clock=clock).over()
  counted = make(clock=clock, max_forwards=10)
  counted.fitness.forwards = 5.0
  assert counted.over(0.5)
  assert not counted.over(0.6)


def test_steps_are_recorded_and_shown(tmp_path):
  clock, lines = Clock(), []
  record = make(tmp_path, clock, show=lines.append)
  clock.now += 4
  record.fitness.forwards = 20.0
  step(record, 1, ratio=0.25, differ=0.5, of=9)
  step(record, 2, ratio=None, mean=None)
  assert lines == [
    "m 25 %, s 1/9: best distance 1, mean 2, 20 forward passes (5.00/s), 4 s, "
    "about 32 s of this level left",
    "m all levels, s 2: best distance 1, 20 forward passes (5.00/s), 4 s",
  ]
  one, two = steps(Workdir(tmp_path), "m", 3)
  assert (one["ratio"], one["differ"], one["seconds"], one["forwards"]) == (0.25, 0.5, 4, 20)
  assert (two["ratio"], two["mean"]) == (None, None)


def test_lines_of_progress_are_few():
  clock, lines = Clock(), []
  record = make(clock=clock, show=lines.append)
  for number in range(25):
    clock.now += 1
    record.tick(f"{number}")
  assert lines == ["m: 9", "m: 19"]
  record.note("at once")
  assert lines[-1] == "m: at once"


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
  clock = Clock()
  with make(tmp_path, clock) as record:
    step(record, 0)
    step(record, 1, best=np.inf)  # shown only
    clock.now += 30
    record.fitness.forwards = 7.0
    record.save(TREE, more="than this")
    step(record, 2)
    record.fitness.forwards = 9.0
    clock.now += 30
  clock.now += 10**6
  with make(tmp_path, clock) as record:
    tree, metadata = record.restore({"a": np.zeros(3)})
    np.testing.assert_array_equal(tree["a"], TREE["a"])
    assert metadata["more"] == "than this"
    assert (record.seconds, record.fitness.forwards) == (30, 7)
    assert [r["step"] for r in steps(Workdir(tmp_path))] == [0]
    step(record, 2)
    record.save(TREE)
  with make(tmp_path, clock) as record:
    record.restore({"a": np.zeros(3)})
    assert [r["step"] for r in steps(Workdir(tmp_path))] == [0, 2]


def test_no_checkpoint_drops_all_steps_of_this_search(tmp_path):
  with make(tmp_path) as record:
    step(record, 0)
  with make(tmp_path, seed=4) as record:
    step(record, 0)
    assert record.restore(TREE) is None
  assert [r["seed"] for r in steps(Workdir(tmp_path))] == [3]


def test_made_from_is_compared_as_json_has_it(tmp_path):
  values = {"levels": (0.25, 0.5), "none": None, "size": np.int64(3), "weights": {1: 0.1}}
  with make(tmp_path, made_from=values) as record:
    record.save(TREE)
  with make(tmp_path, made_from=json.loads(json.dumps(values, default=int))) as record:
    assert record.restore(TREE) is not None
  with (
    make(tmp_path, made_from=values | {"none": 1}) as record,
    pytest.raises(
      ValueError, match=r"made for another model, data or .* remove .*search/m or name"
    ),
  ):
    record.restore(TREE)


def test_checkpoint_of_other_shapes_says_what_to_do(tmp_path):
  with make(tmp_path) as record:
    record.save(TREE)
  with (
    make(tmp_path) as record,
    pytest.raises(ValueError, match=r"other settings: remove .*search/m or name another workdir"),
  ):
    record.restore({"a": np.zeros(4)})


def test_nothing_is_kept_without_a_place():
  record = make()
  step(record, 0)
  record.save(TREE)
  assert record.restore(TREE) is None
