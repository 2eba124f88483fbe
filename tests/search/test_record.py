"""What searches share: clock, rows, progress, checkpoints."""

import json
import types

import numpy as np
import pytest

from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.search import SearchLog, Track

TREE = {"a": np.arange(3.0)}


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def make(folder=None, clock=None, **options):
  fitness = types.SimpleNamespace(forwards=0.0)
  if folder:
    options["checkpoints"] = Checkpoints(folder / "states")
    options["log"] = SearchLog(folder / "search.csv")
  return Track(fitness, clock=clock or Clock(), **{"method": "m", "seed": 3, **options})


def row(track, step, **changes):
  track.row(**{"ratio": 0.5, "step": step, "best": 1.0, "mean": 2.0, "stage": "s", **changes})


def test_limits_of_time_and_evaluations_are_shared():
  clock = Clock()
  track = make(clock=clock, max_minutes=2)
  clock.now += 59
  assert not track.over(0.5)
  clock.now += 1
  assert track.over(0.5)
  assert not track.over()
  assert track.seconds == 60
  assert make(clock=clock, max_minutes=2, seconds=120).over()
  clock.now += 10**9
  assert not make(clock=clock).over()
  counted = make(clock=clock, max_forwards=10)
  counted.fitness.forwards = 5.0
  assert counted.over(0.5)
  assert not counted.over(0.6)


def test_rows_are_recorded_and_shown(tmp_path):
  clock, lines = Clock(), []
  track = make(tmp_path, clock, show=lines.append)
  clock.now += 4
  track.fitness.forwards = 20.0
  row(track, 1, ratio=0.25, differ=0.5, of=9)
  row(track, 2, ratio=None, mean=None)
  assert lines == [
    "m 25 %, s 1/9: best 1, mean 2, 20 evaluations (5.00/s), 4 s, about 32 s of this level left",
    "m all levels, s 2: best 1, 20 evaluations (5.00/s), 4 s",
  ]
  one, two = SearchLog(tmp_path / "search.csv").rows("m", 3)
  assert (one["ratio"], one["differ"], one["seconds"], one["forwards"]) == (0.25, 0.5, 4, 20)
  assert (two["ratio"], two["mean"]) == (None, None)


def test_lines_of_progress_are_few():
  clock, lines = Clock(), []
  track = make(clock=clock, show=lines.append)
  for number in range(25):
    clock.now += 1
    track.tick(f"{number}")
  assert lines == ["m: 9", "m: 19"]
  track.note("at once")
  assert lines[-1] == "m: at once"


def test_resume_drops_what_came_behind_the_checkpoint(tmp_path):
  clock = Clock()
  with make(tmp_path, clock) as track:
    row(track, 0)
    row(track, 1, best=np.inf)  # shown only
    clock.now += 30
    track.fitness.forwards = 7.0
    track.save(TREE, more="than this")
    row(track, 2)
    track.fitness.forwards = 9.0
    clock.now += 30
  clock.now += 10**6
  with make(tmp_path, clock) as track:
    tree, metadata = track.restore({"a": np.zeros(3)})
    np.testing.assert_array_equal(tree["a"], TREE["a"])
    assert metadata["more"] == "than this"
    assert (track.seconds, track.fitness.forwards) == (30, 7)
    log = SearchLog(tmp_path / "search.csv")
    assert [r["step"] for r in log.rows()] == [0]
    row(track, 2)
    track.save(TREE)
  with make(tmp_path, clock) as track:
    track.restore({"a": np.zeros(3)})
    assert [r["step"] for r in log.rows()] == [0, 2]


def test_no_checkpoint_drops_all_rows_of_this_search(tmp_path):
  with make(tmp_path) as track:
    row(track, 0)
  with make(tmp_path, seed=4) as track:
    row(track, 0)
    assert track.restore(TREE) is None
  assert [r["seed"] for r in SearchLog(tmp_path / "search.csv").rows()] == [3]


def test_made_from_is_compared_as_json_has_it(tmp_path):
  values = {"levels": (0.25, 0.5), "none": None, "size": np.int64(3), "weights": {1: 0.1}}
  with make(tmp_path, made_from=values) as track:
    track.save(TREE)
  with make(tmp_path, made_from=json.loads(json.dumps(values, default=int))) as track:
    assert track.restore(TREE) is not None
  with (
    make(tmp_path, made_from=values | {"none": 1}) as track,
    pytest.raises(ValueError, match=r"made for another model, data or .* remove .*states or name"),
  ):
    track.restore(TREE)


def test_checkpoint_of_other_shapes_says_what_to_do(tmp_path):
  with make(tmp_path) as track:
    track.save(TREE)
  with (
    make(tmp_path) as track,
    pytest.raises(ValueError, match=r"other settings: remove .*states or name another workdir"),
  ):
    track.restore({"a": np.zeros(4)})


def test_nothing_is_kept_without_a_place():
  track = make()
  row(track, 0)
  track.save(TREE)
  assert track.restore(TREE) is None
