"""Runs that are there already: which are taken, which are refused, and what is marked."""

import dataclasses
import json

import pytest

from configs import sweep_digits
from experiments.sweeps.found import claim
from experiments.sweeps.plan import plan
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps import collect
from flexiq_jax.runs.sweeps import layouts as laid
from flexiq_jax.runs.sweeps.layouts import Layout
from tests.experiments.sweeps.finished_for_test import finish
from tests.runs_for_test import start

TINY = "--config=configs/sweep_digits.py:runlocal"
TOLD = "its workdir holds a run of another config"


def test_a_workdir_of_another_config_is_not_mixed_in(tmp_path):
  config = sweep_digits.get_config("runlocal")
  first, second, *_ = plan(config, tmp_path)
  for cell in (first, second):
    cell.workdir.mkdir()
    (cell.workdir / "config.json").write_text(json.dumps(first.config))
  first, second = claim((first, second), (), ())
  assert first.other == "" and second.other.endswith("another config: seed was 0, is now 1")


def test_a_finished_run_of_other_overrides_is_refused_by_name(tmp_path):
  config = sweep_digits.get_config("runlocal")
  first, second, *_ = plan(config, tmp_path)
  for cell in (first, second):
    finish(cell)
  changed = {**second.config, "batch_size": 5, "dynamic": True}
  (second.workdir / "config.json").write_text(json.dumps(changed))
  assert second.finished and not claim([second], (), ())[0].finished
  ended = start(TINY, "--config.executor=print", f"--workdir={tmp_path}")
  assert (ended.status, ended.error) == (0, "")
  assert f"--workdir={second.workdir}" not in ended.out  # it is not overwritten either
  status = {row["cell"]: row["status"] for row in collect.read_csv(tmp_path / "results.csv")}
  assert [*status.values()] == ["finished", "missing", *["waiting"] * 4]
  report = (tmp_path / "report.md").read_text()
  changes = "batch_size was 5, is now 20, dynamic was true, is now false"
  why = f"{TOLD}: {changes}"
  assert f"| {second.name} | missing: {why} |" in report and "1 of 6 have finished" in report


def test_rows_from_before_a_config_was_overruled_are_marked(tmp_path):
  first, second, *_ = plan(sweep_digits.get_config("runlocal"), tmp_path)
  for cell in (first, second):
    finish(cell)
  path = first.workdir / "results.csv"
  lines = path.read_text().splitlines()
  lines[3] = lines[3].replace(files.digest(first.config), "0123abcd")
  path.write_text("\n".join(lines) + "\n")
  start(TINY, "--config.executor=print", f"--workdir={tmp_path}")
  rows = collect.read_csv(tmp_path / "results.csv")
  marked = [row for row in rows if row["reason"]]
  assert [(row["cell"], row["ratio"]) for row in marked] == [(first.name, 2 / 20)]
  assert marked[0]["config"].endswith("-0123abcd") and marked[0]["status"] == "finished"


def test_runs_that_were_made_elsewhere_are_found_by_their_config(tmp_path):
  config = sweep_digits.get_config("runlocal")
  first, second, third, *_ = plan(config, tmp_path / "sweep")
  by_hand = tmp_path / "by_hand"
  for cell, name in ((first, "any"), (second, "begun"), (third, "changed")):
    finish(dataclasses.replace(cell, workdir=by_hand / name))
  (by_hand / "begun" / "finished").unlink()
  changed = {**third.config, "batch_size": 5}
  (by_hand / "changed" / "config.json").write_text(json.dumps(changed))
  for also in (by_hand, by_hand / "any"):
    flag = f"--config.also=('{also}',)"
    ended = start(TINY, "--config.executor=print", flag, f"--workdir={tmp_path / 'sweep'}")
    assert (ended.status, ended.error) == (0, "")
    rows = collect.read_csv(tmp_path / "sweep" / "results.csv")
    assert {row["cell"] for row in rows if row["status"] == "finished"} == {first.name}
    assert len(rows) == 20 + 5
  workdirs = [cell.workdir for cell in claim((first, second, third), [str(by_hand)], ())]
  assert workdirs == [by_hand / "any", second.workdir, third.workdir]
  ended = start(TINY, "--config.also=('/no/folder',)", "--dry_run")
  assert ended.error == "error: config.also: there is no folder /no/folder"


def test_a_run_that_may_differ_counts_and_its_numbers_are_marked(tmp_path):
  """One elsewhere and one in its own workdir; a third differs in more than it may."""
  folder, by_hand = tmp_path / "sweep", tmp_path / "by_hand"
  config = sweep_digits.get_config("runlocal")
  first, second, third, *_ = plan(config, folder)
  for cell, changed in (
    (dataclasses.replace(first, workdir=by_hand / "any"), {"batch_size": 5}),
    (second, {"batch_size": 5}),
    (third, {"batch_size": 5, "dynamic": True}),
  ):
    finish(cell)
    (cell.workdir / "config.json").write_text(json.dumps({**cell.config, **changed}))
  also = (f"--config.also=('{by_hand}',)", "--config.differ=('batch_size',)")
  ended = start(TINY, "--config.executor=print", *also, f"--workdir={folder}")
  assert (ended.status, ended.error) == (0, "")
  rows = collect.read_csv(folder / "results.csv")
  why = "the run differs from the plan: batch_size was 5, is now 20"
  assert {row["cell"]: (row["status"], row["reason"]) for row in rows[:41]} == {
    **{cell.name: ("finished", why) for cell in (first, second)},
    third.name: ("missing", f"{TOLD}: dynamic was true, is now false"),
  }
  layout = Layout(title="x", rows="seed", columns=(("0 %", "ratio=0"), ("INT8", "method=int8")))
  assert laid.markdown(layout, rows[:20]).splitlines()[2:] == [
    *(r"| 0 | 90.00\* | — |", "", f"`*`: {first.name}: {why}.")
  ]


@pytest.mark.parametrize(
  ("differ", "message"),
  [
    (("batchsize",), "differ: 'batchsize' is no field of a cell; close ones: batch_size"),
    (("seed",), "any would be digits-group_size2-seed0 and digits-group_size2-seed1; name fewer"),
  ],
)
def test_wrong_fields_that_may_differ_are_refused(tmp_path, differ, message):
  cells = plan(sweep_digits.get_config("runlocal"), tmp_path / "sweep")
  finish(dataclasses.replace(cells[0], workdir=tmp_path / "any"))
  with pytest.raises(ValueError, match=message):
    claim(cells, [str(tmp_path)], differ)
