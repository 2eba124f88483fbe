"""The comparison with a method that trains, from the command line: images, rows, settings."""

import csv
import re

import pytest

from configs import table5
from experiments.comparison.tables import settings_of
from flexiq_jax.methods import METHODS
from tests.runs_for_test import start

CONFIG = (
  "--config=configs/table5.py:runlocal",
  "--config.model_args=width=8,depths=(1,)",
  "--config.experiment=compare",
  "--config.comparison.methods=('robustquant',)",
  "--config.comparison.averages=(4.0,)",
)


def test_a_row_says_how_long_it_trained(tmp_path):
  ended = start(*CONFIG, f"--workdir={tmp_path}")
  assert (ended.status, ended.error) == (0, "")
  assert "robustquant, steps: 2/2" in ended.out
  with (tmp_path / "results.csv").open(newline="") as file:
    rows = {row["method"]: row for row in csv.DictReader(file)}
  assert [*rows] == ["float", "robustquant"]
  row = rows["robustquant"]
  assert (row["ratio"], row["avg_bits"], row["steps"]) == ("1.0", "4.0", "2.0")
  assert float(row["seconds"]) > 0 and float(row["forwards"]) == 3 * 2 * 8 / 16
  assert "| training steps |" in (tmp_path / "report.md").read_text()
  assert (tmp_path / "main/robustquant").is_dir()  # its checkpoints


def test_settings_of_a_method_stand_below_its_name():
  part = table5.get_config().comparison
  assert settings_of(part, METHODS["ptmq"]) == METHODS["ptmq"].Settings()
  part.ptmq.steps, part.ptmq.weight_bits = 7, (4,)
  found = settings_of(part, METHODS["ptmq"])
  assert (found.steps, found.weight_bits) == (7, (4,))
  assert settings_of(part, METHODS["robustquant"]).steps != 7


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("robustquant.learning_rate=0.0", r"config\.comparison\.robustquant\.learning_rate is 0\.0"),
    ("ptmq.steps=0", r"config\.comparison\.ptmq\.steps is 0; an integer from 1"),
    ("anyprecision.drop=cut", r"config\.comparison\.anyprecision\.drop: 'cut' is not one of"),
    ("augmentation=flip", r"config\.comparison\.augmentation: 'flip' is not one of"),
  ],
)
def test_wrong_settings_are_named(change, message, tmp_path):
  ended = start(
    "--config=configs/table5.py:runlocal", f"--config.comparison.{change}", f"--workdir={tmp_path}"
  )
  assert ended.status != 0
  assert re.search(message, ended.error), ended.error
