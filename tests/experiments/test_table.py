"""A table is runs of one job, each resumable by itself, and what their rows say together."""

import csv
import json

import pytest

from experiments import table
from tests.runs_for_test import TINY, compiled, start

__all__ = ["compiled"]
SMALL = (
  "--config=configs/ablation.py:of=digits,runlocal",
  *TINY,
  "--config.ablation.methods=('random','greedy')",
  "--config.ablation.held_out=16",
)


def rows(folder):
  with (folder / "results.csv").open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
  workdir = tmp_path_factory.mktemp("table")
  ended = start(*SMALL, f"--workdir={workdir}", compiled)
  assert (ended.status, ended.error) == (0, ""), ended
  return workdir


def test_rows_are_those_of_the_runs(finished):
  each = [rows(finished / f"seed{seed}") for seed in (0, 1)]
  joined = rows(finished)
  assert [r["seed"] for r in joined if r["method"] == "greedy"] == ["0", "1"]
  assert [r for r in joined if r["seed"] == "1"] == [r for r in each[1] if r["seed"] == "1"]
  # Each row says where it is from; the runs are of two configs.
  assert {(r["model"], r["data"]) for r in joined} == {("resnet8", "digits")}
  assert len({r["config"] for r in joined}) == 2
  text = (finished / "report.md").read_text()
  assert "seeds 2" in text and "| greedy " in text


def test_a_run_is_the_ordinary_run(finished, tmp_path, compiled):
  """The same rows as the job alone has; only the table's own fields are not in its config."""
  own = ("--config.experiment=ablation", "--config.seed=1", f"--workdir={tmp_path}", compiled)
  ended = start(*SMALL, *own)
  assert (ended.status, ended.error) == (0, ""), ended
  strip = lambda found: [{**r, "config": ""} for r in found]
  assert strip(rows(tmp_path)) == strip(rows(finished / "seed1"))
  configs = [json.loads((p / "config.json").read_text()) for p in (tmp_path, finished / "seed1")]
  assert configs[0].pop("table") == {"job": "ablation", "seeds": [0, 1]}
  assert configs[0] == configs[1]


def test_finished_runs_are_left_alone(finished, compiled):
  kept = {p: p.stat().st_mtime_ns for p in (finished / "seed0").rglob("*") if p.is_file()}
  (finished / "finished").unlink()
  (finished / "seed1" / "finished").unlink()
  before = (finished / "results.csv").read_text()
  ended = start(*SMALL, f"--workdir={finished}", compiled)
  assert (ended.status, ended.error) == (0, ""), ended
  assert (finished / "results.csv").read_text() == before
  assert kept == {p: p.stat().st_mtime_ns for p in (finished / "seed0").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("--config.table.job=curves", "config.table.job: 'curves' is not one of ablation, compare"),
    ("--config.table.seeds=()", "config.table.seeds: (); at least one, all different"),
    ("--config.table.seeds=(1,1)", "config.table.seeds: (1, 1); at least one, all different"),
    ("--config.table.seeds=(-1,)", "config.table.seeds: -1 is not in 0..2147483647"),
  ],
)
def test_wrong_tables_are_refused(tmp_path, value, message):
  ended = start(*SMALL, value, f"--workdir={tmp_path / 'run'}")
  assert ended.status == 1 and message in ended.error
  assert set(table.JOBS) <= {"ablation", "compare"}
