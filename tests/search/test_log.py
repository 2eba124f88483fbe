"""The record of a search: what was added is read, whatever a crash left behind."""

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

from flexiq_jax.runs import files
from flexiq_jax.search.log import SearchLog

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
def log(tmp_path):
  return SearchLog(tmp_path / "search.csv")


def test_no_file_is_no_rows(log):
  assert log.rows() == []
  assert log.cut("evolution", 0, 0) == 0
  assert not log.path.exists()


def test_file_is_readable_by_eye(log):
  log.add(**ROW)
  log.add(**ROW | {"ratio": None, "step": 1, "differ": 0.75, "mean": None, "stage": "evolution"})
  assert log.path.read_text().splitlines() == [
    "method,ratio,seed,step,forwards,seconds,best,mean,differ,stage",
    "evolution,0.25,0,0,32.0,1.5,0.125,0.5,,seeds",
    "evolution,,0,1,32.0,1.5,0.125,,0.75,evolution",
  ]


def test_arrays_are_numbers_and_levels_that_print_alike_are_one(log):
  log.add(
    **ROW
    | {
      "ratio": 0.1 + 0.2,
      "seed": np.int64(3),
      "step": 2,
      "forwards": 64,
      "best": jnp.float32(0.1),
      "mean": np.float64(0.3),
    }
  )
  (row,) = log.rows()
  assert (row["ratio"], row["seed"], row["forwards"]) == (0.3, 3, 64.0)
  assert (row["best"], row["mean"]) == (float(np.float32(0.1)), 0.3)
  kinds = {name: type(value) for name, value in row.items() if value is not None}
  assert kinds == {name: type(ROW[name]) for name in kinds}


def test_rows_of_one_search(log):
  for method, seed in itertools.product(("evolution", "surrogate"), (0, 1)):
    log.add(**ROW | {"method": method, "seed": seed})
  assert len(log.rows()) == 4
  assert [r["seed"] for r in log.rows("surrogate")] == [0, 1]
  assert [r["method"] for r in log.rows(seed=1)] == ["evolution", "surrogate"]
  assert log.rows("surrogate", 1) == [ROW | {"method": "surrogate", "seed": 1}]
  assert log.rows("surrogate", 2) == []


_POSITIVE = st.floats(0, allow_infinity=False)
_FINITE = st.floats(allow_nan=False, allow_infinity=False)
_NAMES = st.text("abc, \"'|é{}:", min_size=1).filter(str.strip)
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
def test_whole_rows_survive_a_crash_at_any_byte(tmp_path_factory, rows, data):
  log = SearchLog(tmp_path_factory.mktemp("run") / "search.csv")
  for row in rows:
    log.add(**row)
  assert log.rows() == rows
  content = log.path.read_bytes()
  left = content[: data.draw(st.integers(0, len(content)))]
  log.path.write_bytes(left)
  whole = rows[: max(left.count(b"\n") - 1, 0)]
  assert log.rows() == whole
  log.add(**rows[-1])
  assert log.rows() == [*whole, rows[-1]]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"method": ""}, r"method is '': expected a name of one line"),
    ({"method": None}, "method is None"),
    ({"stage": "a\nb"}, "stage is"),
    ({"ratio": 25}, r"ratio is 25: expected a fraction in 0\.\.1, or None"),
    ({"seed": None}, "seed is None: expected a whole number"),
    ({"seed": 1.0}, "seed is 1.0"),
    ({"step": -1}, "step is -1"),
    ({"step": True}, "step is True"),
    ({"forwards": -1.0}, "forwards is -1.0"),
    ({"seconds": float("inf")}, "seconds is inf: expected a finite number"),
    ({"best": float("nan")}, "best is nan: expected a finite number"),
    ({"best": None}, "best is None"),
    ({"mean": np.float32("nan")}, "mean is .*nan.*: expected a finite number, or None"),
    ({"mean": "0.5"}, "mean is '0.5'"),
    ({"differ": 1.5}, "differ is 1.5"),
    ({"differ": np.zeros(2)}, "differ is array"),
  ],
)
def test_wrong_rows_are_refused_unwritten(log, change, message):
  with pytest.raises(ValueError, match=message):
    log.add(**ROW | change)
  assert not log.path.exists()


@pytest.mark.parametrize(
  "content",
  [b"a,b\n1,2\n", b"a,b", b"\xff\xfe\n", b"method,ratio,seed\n", b"\n", b"{}"],
)
def test_other_file_is_refused_and_left_alone(log, content):
  log.path.write_bytes(content)
  for act in (log.rows, lambda: log.add(**ROW), lambda: log.cut("evolution", 0, 0)):
    with pytest.raises(ValueError, match=r"search.csv is no search log: its first line is"):
      act()
  assert log.path.read_bytes() == content


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b"", "0 cells, expected 10"),
    (b"evolution,0.25,0", "3 cells"),
    (b"evolution,0.25,0,0,32.0,1.5,0.125,0.5,,seeds,more", "11 cells"),
    (b"evolution,0.25,x,0,32.0,1.5,0.125,0.5,,seeds", "'x'"),
    (b"evolution,0.25,0,0,32.0,1.5,nan,0.5,,seeds", "best is"),
    (b"evolution,0.25,0,0,32.0,1.5,,0.5,,seeds", "best is None"),
    (b"\xff,0.25,0,0,32.0,1.5,0.125,0.5,,seeds", "decode"),
    (b'"evolution,0.25,0,0,32.0,1.5,0.125,0.5,,seeds', "unexpected end"),
  ],
)
def test_damage_inside_names_its_line(log, line, reason):
  log.add(**ROW)
  with log.path.open("ab") as file:
    file.write(line + b"\n")
  log.add(**ROW)
  for act in (log.rows, lambda: log.cut("evolution", 0, 0)):
    with pytest.raises(ValueError, match=rf"search.csv, line 3, is no row .*{reason}"):
      act()


@given(
  searches=st.lists(st.sampled_from([("a", 0), ("a", 1), ("b", 0)]), max_size=12),
  keep=st.integers(0, 12),
)
def test_cut_keeps_the_oldest_rows_and_all_of_others(tmp_path_factory, searches, keep):
  log = SearchLog(tmp_path_factory.mktemp("run") / "search.csv")
  for i, (method, seed) in enumerate(searches):
    log.add(**ROW | {"method": method, "seed": seed, "best": i})
  before, own = log.rows(), searches.count(("a", 0))
  if keep > own:
    with pytest.raises(ValueError, match=rf"keep is {keep}, .* holds {own} rows of 'a' with seed"):
      log.cut("a", 0, keep)
    assert log.rows() == before
    return
  assert log.cut("a", 0, keep) == own - keep
  assert log.rows("a", 0) == [r for r in before if (r["method"], r["seed"]) == ("a", 0)][:keep]
  others = [r for r in before if (r["method"], r["seed"]) != ("a", 0)]
  assert [r for r in log.rows() if (r["method"], r["seed"]) != ("a", 0)] == others
  assert log.cut("a", 0, keep) == 0


def test_cut_refuses_fewer_than_none(log):
  log.add(**ROW)
  with pytest.raises(ValueError, match=r"keep is -1, .*: expected 0\.\.1"):
    log.cut("evolution", 0, -1)
  assert log.rows() == [ROW]


def test_cut_drops_half_a_line_as_well(log):
  for step in range(3):
    log.add(**ROW | {"step": step})
  log.path.write_bytes(log.path.read_bytes()[:-3])
  assert log.cut("evolution", 0, 1) == 1
  log.add(**ROW | {"step": 7})
  assert [r["step"] for r in log.rows()] == [0, 7]


def test_crash_while_rows_are_cut_loses_nothing(log, monkeypatch):
  for step in range(3):
    log.add(**ROW | {"step": step})
  before = log.path.read_bytes()

  def crash(*args):
    raise OSError("power is gone")

  with monkeypatch.context() as patch:
    patch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="power is gone"):
      log.cut("evolution", 0, 1)
  assert log.path.read_bytes() == before
  assert sorted(p.name for p in log.path.parent.iterdir()) == [".lock", "search.csv"]


def test_writers_at_once_lose_no_row(log):
  """Rows of one search are cut while others are added."""

  def work(seed):
    mine = SearchLog(log.path)
    for step in range(8):
      mine.add(**ROW | {"seed": seed, "step": step})
      if seed % 2:
        mine.cut("evolution", seed, 1)

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [len(log.rows(seed=seed)) for seed in range(4)] == [8, 1, 8, 1]


_ENDLESS = """
import itertools, sys
from flexiq_jax.search.log import SearchLog
log = SearchLog(sys.argv[1])
for step in itertools.count():
  log.add(method="m", ratio=0.5, seed=0, step=step, forwards=step, seconds=step, best=1, mean=1,
          stage="evolution")
  print(step, flush=True)
"""


def test_killed_search_keeps_every_step_that_was_done(log):
  root = pathlib.Path(__file__).parent.parent.parent
  command = (sys.executable, "-c", _ENDLESS, str(log.path))
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line == "20\n":
        process.kill()
    process.wait()
  steps = [row["step"] for row in log.rows()]
  assert len(steps) > 20
  assert steps == list(range(len(steps)))
