"""Every config loads, says its command, describes its model, and runs in small without data."""

import ast
import pathlib
import re

import pytest

from configs import common
from experiments import curve
from experiments.shared import checks
from flexiq_jax import models
from tests.runs_for_test import compiled, start

ROOT = pathlib.Path(__file__).parent.parent
ALL = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "common")
SWEEPS = ("clado", "group_size", "quantune", "results", "sweep_digits", "table2", "table7")
NAMES = [name for name in ALL if name not in SWEEPS]
IMAGENET = [
  n
  for n in NAMES
  if n.startswith(("deit", "swin", "vit_", "resnet", "squeezenet", "vgg")) and "cifar" not in n
]
__all__ = ["compiled"]


def load(name, arg=None):
  module = __import__(f"configs.{name}", fromlist=["get_config"])
  return module.get_config(arg).lock()


def test_there_are_configs():
  assert {"digits", "deit_s", "resnet18", "vit_cifar10", "efficientnet_lite0"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_it_is(name):
  text = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
  assert text and f"python run.py --config=configs/{name}.py" in text
  # What to expect from it: a number, with its unit.
  assert " %" in text.split("\n\n", 1)[1]


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_says_what_it_is_and_plans_its_small_variant(name, tmp_path):
  text = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
  assert text and f"python run.py --config=configs/{name}.py" in text
  assert "public" in text or " %" in text  # what to expect
  assert " CPU core" in text  # how long, on what
  ended = start(f"--config=configs/{name}.py:runlocal", "--dry_run", f"--workdir={tmp_path}")
  assert (ended.status, ended.error) == (0, "")
  count, left = re.search(r"\n(\d+) cells, (\d+) to be run\n", ended.out).groups()
  assert count == left  # nothing is missing


@pytest.mark.parametrize("name", NAMES)
def test_values_are_checked_and_complete(name):
  config = load(name)
  settings = checks.check(config)
  spec = models.get(config.model)
  assert settings.preprocess.crop == spec.crop
  assert settings.ratios == (0.0, 0.25, 0.5, 0.75, 1.0)
  assert config.weights and config.data.name and config.calibration.name
  assert (config.data.split, config.calibration.split) == ("test", "train")
  assert set(config.variants) <= set(curve.VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_of_the_small_variant(name):
  ended = start(f"--config=configs/{name}.py:runlocal", "--dry_run")
  assert (ended.status, ended.error) == (0, "")
  assert "_runlocal\n" in ended.out
  assert " 4/8\n" in ended.out


def test_small_transformer_runs_without_data(tmp_path, compiled, monkeypatch):
  run_small("vit_s", tmp_path, compiled, monkeypatch)  # of convolutions test_run.py takes care


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    *("resnet18", "resnet50", "swin_t", "mobilenet_v2", "efficientnet_lite0", "vit_cifar10"),
    *("squeezenet1_0", "vgg16"),
  ],
)
def test_other_small_variants_run_without_data(name, tmp_path, compiled, monkeypatch):
  run_small(name, tmp_path, compiled, monkeypatch)


def run_small(name, tmp_path, compiled, monkeypatch):
  monkeypatch.delenv("FLEXIQ_DATA", raising=False)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  ended = start(f"--config=configs/{name}.py:runlocal", f"--workdir={tmp_path}", compiled)
  assert (ended.status, ended.error) == (0, "")
  assert len((tmp_path / "results.csv").read_text().splitlines()) == 10
  assert "the figures show that the pipeline runs, no accuracy" in (
    (tmp_path / "report.md").read_text()
  )


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_models_take_photographs_instead(name):
  config = load(name, "folder")
  assert config.weights == load(name).weights
  assert config.data.root == "$FLEXIQ_DATA/nips2017_dev500"
  assert config.calibration.root == "$FLEXIQ_DATA/imagenet_sample1000"
  assert checks.check(config).preprocess.resize is None  # they are stored at 256 x 256


def test_options_are_read():
  options = common.parse_arg("runlocal,batch=8,rate=1e-2", runlocal=False, batch=1, rate=1.0, x="y")
  assert options.to_dict() == {"runlocal": True, "batch": 8, "rate": 0.01, "x": "y"}
  assert common.parse_arg("runlocal=false", runlocal=True).runlocal is False
  assert common.parse_arg(None, runlocal=False).runlocal is False


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("runlcal", "config argument 'runlcal' is unknown; accepted: runlocal, batch"),
    ("runlocal=yes", "config argument runlocal='yes': true or false is accepted"),
    ("batch=many", "config argument batch='many': int is accepted"),
    ("batch", "config argument batch='': int is accepted"),
  ],
)
def test_wrong_options_are_refused(arg, message):
  with pytest.raises(ValueError) as error:
    common.parse_arg(arg, runlocal=False, batch=1)
  assert str(error.value) == message
