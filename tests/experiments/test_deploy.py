"""The experiment `deploy` on a small random network: what a run leaves, and refusals."""

import csv
import dataclasses
import pathlib
import re

import numpy as np
import pytest

from configs import deploy as deploy_config
from experiments import deploy as experiment
from flexiq_jax.deployment import artifact
from flexiq_jax.kernels import tile_files, tuning
from flexiq_jax.runs.workdir import Workdir
from tests.runs_for_test import TINY, compiled, start

__all__ = ["compiled"]
CONFIG = "--config=configs/deploy.py:of=digits,block=8,runlocal"
SMALL = (
  CONFIG,
  *TINY,
  "--config.search.method=greedy",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("deployed")
  ended = start(*SMALL, f"--workdir={workdir}", compiled)
  assert (ended.status, ended.error) == (0, ""), ended
  return workdir


def test_rows_agree(finished):
  with (finished / "results.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  methods = ("simulated", "deployed", "simulated_rounded")
  assert [(r["method"], r["ratio"]) for r in rows] == [
    ("float", ""),
    *((m, r) for r in ("0.0", "0.5", "1.0") for m in methods),
  ]
  of = {(r["method"], r["ratio"]): r for r in rows}
  for ratio in ("0.0", "0.5", "1.0"):
    deployed, rounded = of["deployed", ratio], of["simulated_rounded", ratio]
    assert (deployed["differing"], deployed["images"]) == ("0", "20")
    assert float(deployed["logit_error"]) < 1e-4
    assert deployed["top1"] == of["simulated", ratio]["top1"]
    # The last bit alone; a code may move, but not far.
    assert 0 < float(rounded["logit_error"]) < 0.1


def test_report_and_artifact(finished):
  text = (finished / "report.md").read_text()
  assert "# Deployed FlexiQ: resnet8 on digits" in text
  assert "1 layers take codes in their order from the layer before, 0 take activations" in text
  assert "that are in their order, 1 gather." in text
  assert "implementation reference; tiles by rule" in text
  assert re.search(r"100 changes of the ratio.*in 1 compiled program", text)
  assert "| layer1/0/conv2 | codes in order | from layer1/0/conv1 |" in text
  document = artifact.read(finished / "artifact")
  assert (document.model, document.levels) == ("resnet8", (0.0, 0.5, 1.0))


def test_recipe_of_a_finished_run_is_deployed(finished, tmp_path, compiled):
  recipe = f"--config.recipe={finished / 'recipe.json'}"
  ended = start(*SMALL, recipe, f"--workdir={tmp_path}", compiled)
  assert (ended.status, ended.error) == (0, "")
  assert not (tmp_path / "calibration").exists()
  own, other = ([{**r, "config": ""} for r in Workdir(p).rows()] for p in (tmp_path, finished))
  assert own == other  # but for the config, which names a recipe here


def test_switch_cost_counts_what_it_measured():
  @dataclasses.dataclass
  class Runner:
    seen: list

    def switch(self, ratio):
      self.seen.append(ratio)

    def wait(self):
      self.seen.append("wait")

  runner = Runner([])
  found = experiment.switch_cost(runner, (0.0, 1.0), 3)
  assert runner.seen == [0.0, "wait", 1.0, "wait", 0.0, "wait"]
  assert found["switches"] == 3
  assert 0 < found["p50"] <= found["p99"] < 1e6
  assert np.isfinite(found["p99"])


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("granule", 3, "config.deploy.granule: 3; a positive even number"),
    ("switches", 0, "config.deploy.switches: 0; 1 or more"),
    ("tune", True, "config.deploy.tune: True without config.deploy.tuning; name a folder"),
    ("tuning", "tiles", "config.deploy.tuning: 'tiles', but device 'cpu' runs the reference"),
  ],
)
def test_refusals(tmp_path, field, value, message):
  ended = start(*SMALL, f"--config.deploy.{field}={value}", f"--workdir={tmp_path / 'x'}")
  assert ended.status == 1
  assert message in ended.error


def test_tiles_are_not_measured_where_there_are_none(tmp_path):
  fields = ("--config.deploy.tune=True", f"--config.deploy.tuning={tmp_path / 'tiles'}")
  ended = start(*SMALL, *fields, f"--workdir={tmp_path / 'x'}")
  assert ended.status == 1
  assert "config.deploy.tune: device 'cpu' runs the reference" in ended.error
  assert not (tmp_path / "tiles").exists()


def test_tiles_of_the_models_products_are_measured_first(tmp_path, monkeypatch):
  """On a device that has tiles; measuring itself is replaced."""
  seen = []
  monkeypatch.setattr(tile_files, "implementation", lambda kind: "tpu")
  monkeypatch.setattr(tile_files, "read", lambda folder, kind=None: {})
  monkeypatch.setattr(tuning, "autotune", lambda shapes, folder, progress: seen.extend(shapes))
  config = deploy_config.get_config("of=digits,block=8,runlocal")
  config.deploy.update(tune=True, tuning=str(tmp_path / "tiles"))
  config.update(model_args="width=8,depths=(1,)", weights="random", batch_size=20, ratios=(1.0,))
  config.calibration.update(images=16, batch_size=16)
  config.data.limit, config.search.method = 20, "greedy"
  inputs = experiment.prepare(config)
  experiment.run(inputs, Workdir(tmp_path), "command")
  assert seen and seen == sorted(set(seen))
  assert {shape.m % config.batch_size for shape in seen} == {0}
