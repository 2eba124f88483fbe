"""A sweep of a real run, as a user meets it."""

import json
import shutil

import pytest

from configs import sweep_digits
from experiments.sweeps.plan import plan
from flexiq_jax.runs.sweeps import collect
from tests.runs_for_test import start

SWEEP = "--config=configs/sweep_digits.py:runlocal"


def test_a_cell_is_the_ordinary_run_and_fills_the_table(tmp_path, monkeypatch):
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    monkeypatch.setenv(name, "")  # put back at the end
  only = ("--config.only=size4-seed0", "--config.local.cores=1", f"--workdir={tmp_path}")
  cache = tmp_path / "compiled"
  ended = start(SWEEP, *only, f"--compilation_cache={cache}")
  assert any(cache.iterdir())
  assert (ended.status, ended.error) == (0, ""), ended
  cell = plan(sweep_digits.get_config("runlocal"), tmp_path)[2]
  assert json.loads((cell.workdir / "config.json").read_text()) == cell.config
  assert "report: " in cell.log.read_text()
  rows = collect.read_csv(tmp_path / "results.csv")
  mine = [row for row in rows if row["cell"] == cell.name]
  assert [row["method"] for row in mine][:3] == ["float", "uniform_int8", "uniform_int4"]
  assert all(row["config"] and row["device"] == "cpu" and row["jax"] for row in mine)
  assert not any(row["reason"] for row in mine)  # the rows are of the config that was planned
  assert len(rows) == len(mine) + 5  # the cells that were not asked for
  table = (tmp_path / "report.md").read_text().splitlines()
  top1 = {row["method"]: row["top1"] for row in mine}
  of = lambda method: f"{top1[method]:.2f} (1 of 2)"  # seeds
  assert f"| 4 | {of('float')} | {of('uniform_int8')} | " in "\n".join(table)
  # Once more: nothing to do, the same bytes.
  before = (tmp_path / "results.csv").read_bytes()
  again = start(SWEEP, *only)
  assert (again.status, again.out) == (0, f"report: {tmp_path / 'report.md'}\n")
  assert (tmp_path / "results.csv").read_bytes() == before
  # One that is started by hand with its command is collected as the others are.
  by_hand = plan(sweep_digits.get_config("runlocal"), tmp_path)[3]
  alone = start(*by_hand.command[2:], f"--compilation_cache={cache}")
  assert (alone.status, alone.error) == (0, ""), alone
  assert start(SWEEP, *only).status == 0
  rows = collect.read_csv(tmp_path / "results.csv")
  assert {r["cell"] for r in rows if r["status"] == "finished"} == {cell.name, by_hand.name}
  own = [row for row in rows if row["cell"] == by_hand.name]
  assert len(own) == len(mine) and own[0]["seed"] == 1
  shutil.rmtree(by_hand.workdir)
  # Its time and memory are now those of its like.
  planned = start(SWEEP, "--dry_run", f"--workdir={tmp_path}")
  assert "digits-group_size4-seed1  waiting" in planned.out
  (line,) = [one for one in planned.out.splitlines() if one.startswith("digits-group_size4-seed1")]
  assert "12.0 s" not in line and "1.0 GiB" not in line


@pytest.mark.slow
def test_a_cell_that_failed_is_told_and_runs_again_when_asked(tmp_path):
  """By a config that passes all checks of values and fails where the data is opened."""
  bad = "--config.sweep.bases.digits.fields=(('calibration.split','test'),('weights','random'))"
  flags = (bad, "--config.only=size2-seed0", f"--workdir={tmp_path}")
  ended = start(SWEEP, *flags)
  assert ended.status == 1
  assert "1 of 6 cells failed; the others are in" in ended.error
  assert "digits-group_size2-seed0: error: config.calibration: calibration and eval" in ended.error
  assert "--config.retry runs them again" in ended.error
  log = tmp_path / "digits-group_size2-seed0" / "log.txt"
  assert log.read_text().count("=== ") == 1
  assert start(SWEEP, *flags).status == 1 and log.read_text().count("=== ") == 1
  assert start(SWEEP, *flags, "--config.retry").status == 1
  assert log.read_text().count("=== ") == 2
