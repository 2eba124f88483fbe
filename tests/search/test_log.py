"""The log of a search: every step once, whatever a crash left behind."""

import itertools
import pathlib
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search.log import COLUMNS, add, keep, steps

ROW = {
  "method": "evolution",
  "ratio": 0.25,
  "seed": 0,
  "step": 0,
  "forwards": 32.0,
  "seconds": 1.5,
  "best": 0.125,
  "mean": 0.5,
  "differ": None,
  "stage": "seeds",
}


@pytest.fixture
def workdir(tmp_path):
  return Workdir(tmp_path)


def test_no_file_is_no_steps(workdir):
  assert steps(workdir) == []
  keep(workdir, "evolution", 0, 0)
  assert workdir.events() == []


def test_steps_are_events_of_the_one_log(workdir):
  workdir.event("eval", method="evolution")
  add(workdir, **ROW)
  second = ROW | {"ratio": None, "step": 1, "differ": 0.75, "mean": None, "stage": "evolution"}
  add(workdir, **second)
  assert steps(workdir) == [ROW, second]
  events = workdir.events("search")
  assert [list(event) for event in events] == [["time", "event", *COLUMNS]] * 2


def test_arrays_are_numbers_and_levels_that_print_alike_are_one(workdir):
  values = {"seed": np.int64(3), "best": jnp.float32(0.1), "mean": np.float64(0.3)}
  add(workdir, **ROW | values | {"ratio": 0.1 + 0.2})
  (row,) = steps(workdir)
  assert (row["ratio"], row["seed"]) == (0.3, 3)
  assert (row["best"], row["mean"]) == (float(np.float32(0.1)), 0.3)
  kinds = {name: type(value) for name, value in row.items() if value is not None}
  assert kinds == {name: type(ROW[name]) for name in kinds}


def test_steps_of_one_search(workdir):
  for method, seed in itertools.product(("evolution", "surrogate"), (0, 1)):
    add(workdir, **ROW | {"method": method, "seed": seed})
  assert len(steps(workdir)) == 4
  assert [r["seed"] for r in steps(workdir, "surrogate")] == [0, 1]
  assert [r["method"] for r in steps(workdir, seed=1)] == ["evolution", "surrogate"]
  assert steps(workdir, "surrogate", 1) == [ROW | {"method": "surrogate", "seed": 1}]
  assert steps(workdir, "surrogate", 2) == []


_POSITIVE = st.floats(0, allow_infinity=False)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_NAMES = st.text("abc, \"'|é{}:\n", min_size=1)
ROWS = st.fixed_dictionaries(
  {
    "method": _NAMES,
    "ratio": st.none() | st.integers(0, 100).map(lambda n: n / 100),
    "seed": st.integers(),
    "step": st.integers(0),
    "forwards": _POSITIVE,
    "seconds": _POSITIVE,
    "best": _FINITE,
    "mean": st.none() | _FINITE,
    "differ": st.none() | st.floats(0, 1),
    "stage": _NAMES,
  }
)


@given(st.lists(ROWS, min_size=1, max_size=4), st.data())
def test_whole_steps_survive_a_crash_at_any_byte(tmp_path_factory, rows, data):
  workdir = Workdir(tmp_path_factory.mktemp("run"))
  for row in rows:
    add(workdir, **row)
  assert steps(workdir) == rows
  path = workdir.path / "metrics.jsonl"
  content = path.read_bytes()
  end = data.draw(st.integers(0, len(content)))
  path.write_bytes(content[:end])
  whole = rows[: content[: end + 1].count(b"\n")]  # a line that lacks but its end is one
  assert steps(workdir) == whole
  add(workdir, **rows[-1])
  assert steps(workdir) == [*whole, rows[-1]]


def test_damage_inside_names_its_line(workdir):
  add(workdir, **ROW)
  with (workdir.path / "metrics.jsonl").open("ab") as file:
    file.write(b"{half a line\n")
  add(workdir, **ROW)
  for act in (lambda: steps(workdir), lambda: keep(workdir, "evolution", 0, 0)):
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is no JSON object: remove"):
      act()


@given(
  searches=st.lists(st.sampled_from([("a", 0), ("a", 1), ("b", 0)]), max_size=12),
  count=st.integers(0, 12),
)
def test_the_oldest_steps_are_kept_and_all_of_others(tmp_path_factory, searches, count):
  workdir = Workdir(tmp_path_factory.mktemp("run"))
  for i, (method, seed) in enumerate(searches):
    add(workdir, **ROW | {"method": method, "seed": seed, "best": i})
  before, own = steps(workdir), searches.count(("a", 0))
  if count > own:
    with pytest.raises(ValueError, match=rf"{own} steps of 'a' with seed 0, .* after {count}"):
      keep(workdir, "a", 0, count)
    assert steps(workdir) == before
    return
  keep(workdir, "a", 0, count)
  mine = lambda rows: [r for r in rows if (r["method"], r["seed"]) == ("a", 0)]
  others = lambda rows: [r for r in rows if (r["method"], r["seed"]) != ("a", 0)]
  assert steps(workdir, "a", 0) == mine(before)[:count]
  assert others(steps(workdir)) == others(before)
  # Nothing is said twice, and what is done again stands after what was kept.
  events = workdir.events()
  keep(workdir, "a", 0, count)
  assert workdir.events() == events
  add(workdir, **ROW | {"method": "a", "best": 99})
  assert [r["best"] for r in steps(workdir, "a", 0)] == [
    *(r["best"] for r in mine(before)[:count]),
    99,
  ]


def test_steps_are_done_again_several_times(workdir):
  for kept, numbers in ((0, (0, 1, 2)), (1, (1, 2, 3)), (2, (2,))):
    keep(workdir, "evolution", 0, kept)
    for number in numbers:
      add(workdir, **ROW | {"step": number})
  assert [r["step"] for r in steps(workdir)] == [0, 1, 2]
  assert [r["step"] for r in workdir.events("search")] == [0, 1, 2, 1, 2, 3, 2]


def test_half_a_line_does_not_count(workdir):
  for number in range(3):
    add(workdir, **ROW | {"step": number})
  path = workdir.path / "metrics.jsonl"
  path.write_bytes(path.read_bytes()[:-3])
  keep(workdir, "evolution", 0, 1)
  add(workdir, **ROW | {"step": 7})
  assert [r["step"] for r in steps(workdir)] == [0, 7]


def test_writers_at_once_lose_no_step(workdir):
  """Some go back while others go on."""

  def work(seed):
    mine = Workdir(workdir.path)
    for number in range(8):
      add(mine, **ROW | {"seed": seed, "step": number})
      if seed % 2:
        keep(mine, "evolution", seed, 1)

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [len(steps(workdir, seed=seed)) for seed in range(4)] == [8, 1, 8, 1]


_ENDLESS = """
import itertools, sys
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search.log import add
workdir = Workdir(sys.argv[1])
for step in itertools.count():
  add(workdir, method="m", ratio=0.5, seed=0, step=step, forwards=step, seconds=step, best=1,
      mean=1, stage="evolution")
  print(step, flush=True)
"""


def test_killed_search_keeps_every_step_that_was_done(workdir):
  root = pathlib.Path(__file__).parents[2]
  command = (sys.executable, "-c", _ENDLESS, str(workdir.path))
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line == "20\n":
        process.kill()
    process.wait()
  numbers = [row["step"] for row in steps(workdir)]
  assert len(numbers) > 20
  assert numbers == list(range(len(numbers)))
