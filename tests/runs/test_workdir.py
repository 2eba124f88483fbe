"""The run folder: nothing written is lost, nothing is mixed up."""

import csv
import errno
import json
import pathlib
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.runs import files
from flexiq_jax.runs import workdir as module
from flexiq_jax.runs.workdir import Workdir


def test_unwritable_workdir_is_refused_at_once(tmp_path):
  (tmp_path / "file").write_text("in the way")
  start = time.monotonic()
  with pytest.raises(ValueError, match=r"workdir '.*file/run' cannot be written"):
    Workdir(tmp_path / "file" / "run")
  with pytest.raises(ValueError, match=r"workdir '.*file' cannot be written"):
    Workdir(tmp_path / "file")
  assert time.monotonic() - start < 1


def test_full_disk_is_refused(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
  with pytest.raises(ValueError, match="No space left on device"):
    Workdir(tmp_path)


CONFIG = {
  "model": "resnet20",
  "levels": (0.25, 0.5),
  "search": {"population": 8, "path": pathlib.Path("a/b"), "scale": np.float32(0.5)},
}


def test_same_config_resumes(tmp_path):
  assert Workdir(tmp_path / "run").config(CONFIG) is False
  assert Workdir(tmp_path / "run").config(CONFIG) is True
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert stored["search"] == {"path": "a/b", "population": 8, "scale": 0.5}


def test_other_config_is_refused_by_name(tmp_path):
  Workdir(tmp_path).config(CONFIG)
  other = CONFIG | {"search": {"population": 16, "path": "a/b", "scale": 0.5}, "seed": 1}
  with pytest.raises(ValueError) as error:
    Workdir(tmp_path).config(other)
  message = str(error.value)
  assert "search.population was 8, is now 16" in message
  assert "seed was absent, is now 1" in message
  assert str(tmp_path) in message
  assert "overrule the old one (--overrule)" in message
  assert json.loads((tmp_path / "config.json").read_text())["search"]["population"] == 8


def test_refusal_counts_what_it_does_not_show(tmp_path):
  Workdir(tmp_path).config({f"f{i}": i for i in range(5)})
  with pytest.raises(ValueError, match=r"f2 was 2, is now 3; and 2 more"):
    Workdir(tmp_path).config({f"f{i}": i + 1 for i in range(5)})


def test_overruled_config_keeps_rows_and_reopens_the_run(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.config({"seeds": 1})
  workdir.row("int8", 0.0, 0, top1=90.0)
  workdir.finish()
  assert workdir.config({"seeds": 2}, overrule=True) is True
  assert workdir.has("int8", 0.0, 0)
  assert workdir.finished is None
  assert workdir.events("config_overruled")[0]["changes"] == [["seeds", "1", "2"]]
  assert workdir.config({"seeds": 2}) is True


def test_finished_run_says_so(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.config({"a": 1})
  assert workdir.finished is None
  assert workdir.finished_message() is None
  workdir.finish(top1=91.8)
  again = Workdir(tmp_path)
  again.config({"a": 1})
  assert again.finished is not None and again.finished["top1"] == 91.8
  message = again.finished_message()
  assert str(tmp_path) in message and "nothing to do" in message and "\n" not in message


def test_marker_without_its_config_does_not_count(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.config({"a": 1})
  workdir.finish()
  (tmp_path / "config.json").unlink()
  workdir.config({"a": 2})
  assert workdir.finished is None


def test_events_round_trip(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.event("eval", top1=jnp.float32(0.5), masks=np.arange(3), bad=float("nan"), note="a\nb")
  workdir.event("search", step=1, best={"kl": np.float64(0.25)}, big=np.inf)
  first, second = workdir.events()
  assert {k: v for k, v in first.items() if k != "time"} == {
    "event": "eval",
    "top1": 0.5,
    "masks": [0, 1, 2],
    "bad": "nan",
    "note": "a\nb",
  }
  assert second["best"] == {"kl": 0.25} and second["big"] == "inf"
  assert first["time"] <= second["time"] and first["time"].endswith("+00:00")
  assert workdir.events("search") == [second]


def test_event_may_not_replace_its_time_stamp(tmp_path):
  with pytest.raises(ValueError, match="time"):
    Workdir(tmp_path).event("eval", time=3.0)


@pytest.mark.parametrize("keep", [1, 10, -2])
def test_half_line_of_a_crash_is_ignored_and_cut(tmp_path, keep):
  workdir = Workdir(tmp_path)
  workdir.event("a", step=0)
  workdir.event("b", step=1)
  path = tmp_path / "metrics.jsonl"
  whole, half, _ = path.read_bytes().split(b"\n")
  path.write_bytes(whole + b"\n" + half[:keep])
  assert [e["event"] for e in workdir.events()] == ["a"]
  Workdir(tmp_path).event("c")
  assert [e["event"] for e in workdir.events()] == ["a", "c"]


def test_line_that_lost_only_its_end_is_kept(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.event("a")
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes().rstrip(b"\n"))
  workdir.event("b")
  assert [e["event"] for e in workdir.events()] == ["a", "b"]


def test_damage_inside_the_events_is_an_error(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.event("a")
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"garbage\n" + path.read_bytes())
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 1,"):
    workdir.events()


def test_rows_survive_and_are_found_again(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.row("float", None, None, top1=91.5, images=1000)
  workdir.row("flexiq_greedy", 0.1 + 0.2, 3, top1=np.float32(90.5), p50_ms=1.25, avg_bits=6.8)
  again = Workdir(tmp_path)
  assert again.has("flexiq_greedy", 0.3, 3)
  assert again.has("flexiq_greedy", 0.1 + 0.2, 3)
  assert again.has("float", None, None)
  assert not again.has("flexiq_greedy", 0.3, 4)
  assert not again.has("flexiq_greedy", 0.31, 3)
  assert not again.has("flexiq_random", 0.3, 3)
  again.row("flexiq_greedy", 0.5, 3, top1=89.5, device="cpu")
  with (tmp_path / "results.csv").open(newline="") as file:
    table = list(csv.reader(file))
  assert tuple(table[0]) == (*module.COLUMNS, "p50_ms", "device")
  assert [row[0] for row in table[1:]] == ["float", "flexiq_greedy", "flexiq_greedy"]
  rows = again.rows()
  assert rows[0]["ratio"] is None and rows[0]["seed"] is None and rows[0]["images"] == 1000
  assert rows[1]["ratio"] == 0.3 and rows[1]["seed"] == 3 and rows[1]["top1"] == 90.5
  assert rows[1]["device"] is None and rows[2]["device"] == "cpu" and rows[2]["p50_ms"] is None


def test_row_again_adds_columns_and_keeps_its_history(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.row("int8", 0, 0, top1=90.0, images=10)
  workdir.row("int8", 0.0, 0, top1=91.0, images=None, p50_ms=2.0)
  (row,) = workdir.rows()
  assert (row["top1"], row["images"], row["p50_ms"]) == (91.0, 10, 2.0)
  assert [e["top1"] for e in workdir.events("result")] == [90.0, 91.0]


def test_crash_while_the_table_is_replaced_loses_nothing(tmp_path, monkeypatch):
  workdir = Workdir(tmp_path)
  workdir.row("int8", 0.0, 0, top1=90.0)
  before = (tmp_path / "results.csv").read_bytes()

  def crash(*args):
    raise OSError("power is gone")

  with monkeypatch.context() as patch:
    patch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="power is gone"):
      workdir.row("int4", 1.0, 0, top1=80.0)
  assert (tmp_path / "results.csv").read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "results.csv"]
  workdir.row("int4", 1.0, 0, top1=80.0)
  assert len(workdir.rows()) == 2


def test_writers_at_once_lose_no_row(tmp_path):
  def work(seed):
    workdir = Workdir(tmp_path)
    for ratio in range(8):
      workdir.row("flexiq_random", ratio / 8, seed, top1=90.0)

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  workdir = Workdir(tmp_path)
  assert len(workdir.rows()) == 32
  assert len(workdir.events("result")) == 32


@pytest.mark.parametrize(
  ("method", "ratio", "values", "name"),
  [
    ("", 0.5, {}, "method is ''"),
    ("int8", 50, {}, "ratio is 50"),
    ("int8", float("nan"), {}, "ratio is nan"),
    ("int8", 0.5, {"masks": [1, 2]}, r"masks is \[1, 2\]"),
  ],
)
def test_wrong_rows_are_refused_unwritten(tmp_path, method, ratio, values, name):
  workdir = Workdir(tmp_path)
  with pytest.raises(ValueError, match=name):
    workdir.row(method, ratio, 0, **values)
  assert workdir.rows() == [] and workdir.events() == []


def test_foreign_table_is_refused(tmp_path):
  (tmp_path / "results.csv").write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match=r"results.csv has no column 'method'"):
    Workdir(tmp_path).rows()


_CELLS = st.one_of(
  st.floats(allow_nan=False), st.integers(), st.text("abc, \"'\n|é", min_size=1).filter(str.strip)
)


@given(st.dictionaries(st.sampled_from(["top1", "images", "x", "y"]), _CELLS, min_size=1))
def test_cells_round_trip(tmp_path_factory, values):
  workdir = Workdir(tmp_path_factory.mktemp("run"))
  workdir.row("m", 0.5, 0, **values)
  (row,) = workdir.rows()
  assert {name: row[name] for name in values} == values


_ENDLESS = """
import itertools, sys
from flexiq_jax.runs.workdir import Workdir
workdir = Workdir(sys.argv[1])
for seed in itertools.count():
  workdir.row("flexiq_random", 0.5, seed, top1=90.0 + seed)
  print(seed, flush=True)
"""


def test_killed_run_keeps_every_row_that_was_done(tmp_path):
  root = pathlib.Path(__file__).parent.parent.parent
  command = (sys.executable, "-c", _ENDLESS, str(tmp_path))
  with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      if line == "20\n":
        process.kill()
    process.wait()
  workdir = Workdir(tmp_path)
  rows = workdir.rows()
  assert len(rows) > 20
  assert [(row["seed"], row["top1"]) for row in rows] == [(i, 90 + i) for i in range(len(rows))]
  assert len(rows) <= len(workdir.events("result")) <= len(rows) + 1
  workdir.row("flexiq_random", 0.5, len(rows), top1=0)
  assert len(workdir.rows()) == len(rows) + 1


_RUNS = """
import sys
from flexiq_jax.runs.workdir import Workdir
with Workdir(sys.argv[1]).held():
  print("runs", flush=True)
  sys.stdin.read()
"""


def test_one_process_runs_in_a_workdir(tmp_path):
  root = pathlib.Path(__file__).parent.parent.parent
  command = [sys.executable, "-c", _RUNS, tmp_path]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, cwd=root, **pipes) as other:
    assert other.stdout.readline() == "runs\n"
    message = (
      rf"another process is running here \(process {other.pid} on .*, since 20.*\+00:00\); w"
    )
    with pytest.raises(ValueError, match=message), Workdir(tmp_path).held():
      pass
    other.kill()
  with Workdir(tmp_path).held():  # a dead process holds nothing
    pass


def test_a_finished_run_on_storage_that_cannot_be_written_says_so(tmp_path, monkeypatch):
  made = Workdir(tmp_path)
  made.config(CONFIG)
  made.finish()

  def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(module.tempfile, "TemporaryFile", read_only)
  monkeypatch.setattr(files, "write_text", read_only)
  again = Workdir(tmp_path)
  assert again.config(CONFIG) is True
  assert "this run finished at" in (again.finished_message() or "")
  (tmp_path / "finished").unlink()
  with pytest.raises(ValueError, match="cannot be written"):
    Workdir(tmp_path)


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path):
  left = tmp_path / f".results.csv.{32 * 'a'}"
  left.touch()
  with Workdir(tmp_path).held():
    assert not left.exists()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "[]", '{"a": ' + "[" * 100_000])
def test_a_config_that_is_none_is_told(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json is no JSON object.*restore the file"):
    Workdir(tmp_path).config({"a": 1})
