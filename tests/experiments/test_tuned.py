"""Finetuned models as stages of a run: their rows, their files, and what is refused."""

import jax
import numpy as np
import pytest

from configs import common
from experiments import curve
from experiments.shared import tuned
from flexiq_jax.runs.workdir import Workdir
from tests.runs_for_test import DIGITS, TINY, compiled, start  # noqa: F401

TUNE = (
  DIGITS,
  *TINY,
  "--config.tune=('reconstruct','distill')",
  "--config.distill.images=24",
  "--config.distill.steps=4",
  "--config.distill.every=2",
  "--config.distill.refit=2",
  "--config.distill.warmup=1",
  "--config.distill.batch_size=8",
  "--config.distill.augmentation=shift",
  "--config.distill.learning_rate=0.01",
  "--config.search.method=greedy",
  "--config.random_seeds=()",
)


def results(workdir):
  return Workdir(workdir).rows()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):  # noqa: F811
  workdir = tmp_path_factory.mktemp("tuned") / "run"
  ended = start(*TUNE, "--config.tune_int4", f"--workdir={workdir}", compiled)
  assert ended.status == 0, ended.error
  return workdir


def test_rows_of_every_ratio_and_of_uniform_int4(finished):
  rows = results(finished)
  assert [r["ratio"] for r in rows if r["method"] == "flexiq_distilled"] == [0.0, 0.5, 1.0]
  assert [r["avg_bits"] for r in rows if r["method"] == "uniform_int4_distilled"] == [4.0]
  assert [r["ratio"] for r in rows if r["method"] == "flexiq_reconstructed"] == [0.0, 0.5, 1.0]
  steps = [e["step"] for e in Workdir(finished).events("finetune") if e["name"] == "distill"]
  assert steps == [2, 4]


def test_an_ablation_has_a_row_of_them(compiled, tmp_path):  # noqa: F811
  ended = start(
    "--config=configs/ablation.py:of=digits,runlocal",
    *(*TINY, "--config.experiment=ablation", "--config.ablation.methods=('greedy',)"),
    *("--config.ablation.held_out=16", "--config.tune=('reconstruct',)"),
    *(f"--workdir={tmp_path}", compiled),
  )
  assert ended.status == 0, ended.error
  (row,) = (r for r in results(tmp_path) if r["method"] == "reconstructed")
  assert row["ratio"] == 0.5 and row["gain"] is not None and row["distance_held_out"] > 0
  assert "| reconstructed | 50 %" in (tmp_path / "report.md").read_text()


def test_what_was_finetuned_is_evaluated_and_deployed_by_its_recipe(
  finished,
  compiled,  # noqa: F811
  tmp_path,
):
  given = f"--config.recipe={finished / 'finetuned/distill/recipe.json'}"
  common = (DIGITS, *TINY, given, "--config.random_seeds=()", compiled)
  ended = start(*common, f"--workdir={tmp_path / 'again'}")
  assert ended.status == 0, ended.error
  again = {(r["method"], r["ratio"]): r["top1"] for r in results(tmp_path / "again")}
  for row in results(finished):
    if row["method"] == "flexiq_distilled":
      assert again["flexiq_distill", row["ratio"]] == row["top1"]
  for name in ("recipe.json", "finetuned.safetensors"):
    kept = (finished / "finetuned/distill" / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == kept
  deploy = "--config=configs/deploy.py:of=digits,runlocal"
  ended = start(deploy, *common[1:], f"--workdir={tmp_path / 'deployed'}")
  assert ended.status == 0, ended.error
  for row in results(tmp_path / "deployed"):
    if row["method"] == "deployed":
      assert row["logit_error"] < 0.2 and row["top1"] == again["flexiq_distill", row["ratio"]]


def test_parts_of_images_are_trained_on(tmp_path):
  config = common.other("digits", "runlocal")
  config.tune, config.distill.crop = ("distill",), 4
  config.distill.update(images=24, batch_size=8, augmentation="none")
  inputs = curve.prepare(config)
  settings = inputs.settings.tuning["distill"]
  examples = tuned.Tuner("distill", settings, inputs, Workdir(tmp_path)).examples
  whole = inputs.settings.preprocess.normalize(examples.inputs)
  parts = examples.prepare(jax.random.key(0), examples.inputs)
  assert whole.shape == (24, 8, 8, 1) and parts.shape == (24, 4, 4, 1)
  for part, image in zip(np.asarray(parts), np.asarray(whole), strict=True):
    windows = np.lib.stride_tricks.sliding_window_view(image[..., 0], (4, 4))
    assert np.isclose(windows, part[..., 0], atol=1e-5).all(axis=(2, 3)).any()


def test_parts_of_images_that_the_model_cannot_take():
  config = common.other("vit_cifar10", "runlocal")
  config.tune, config.distill.crop = ("distill",), 16
  config.distill.update(images=24, batch_size=8)
  message = r"config\.distill\.crop: 16, but the model takes images of 32 x 32 pixels alone"
  with pytest.raises(ValueError, match=message):
    curve.prepare(config)


def test_parts_of_images_that_the_teacher_cannot_take():
  config = common.other("resnet20_cifar10", "runlocal")
  config.tune, config.distill.crop = ("distill",), 16
  config.distill.update(images=24, batch_size=8)
  curve.prepare(config)  # the model can
  config.teacher.update(model="vit_cifar10", weights="random", model_args="tiny")
  message = r"config\.distill\.crop: 16, but the teacher takes images of 32 x 32 pixels alone"
  with pytest.raises(ValueError, match=message):
    curve.prepare(config)


def test_recipe_without_its_weights_is_refused_before_anything_runs(finished, tmp_path):
  path = tmp_path / "recipe.json"
  path.write_bytes((finished / "finetuned/distill/recipe.json").read_bytes())
  ended = start(DIGITS, *TINY, f"--config.recipe={path}", f"--workdir={tmp_path / 'w'}")
  assert ended.status == 1
  assert "config.recipe" in ended.error and "finetuned.safetensors, which is miss" in ended.error
  assert not (tmp_path / "w" / "results.csv").exists()


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    (
      "--config.tune=('distil',)",
      "config.tune: 'distil' is not one of reconstruct, distill, ",
    ),
    ("--config.distill.learning_rate=0.0", "config.distill.learning_rate is 0.0; a number above 0"),
    ("--config.distill.learning_rate=nan", "config.distill.learning_rate is nan"),
    ("--config.distill.images=5000", "config.distill.images: 5000; 0..1352 is accepted"),
    ("--config.distill.batch_size=25", "config.distill.batch_size: 25; 1..24 is accepted"),
    ("--config.distill.anchors=(0.0,2.0)", "config.distill.anchors is (0.0, 2.0)"),
    ("--config.distill.augmentation=cutout", "config.distill.augmentation: 'cutout'"),
    ("--config.distill.crop=9", "config.distill.crop: 9; 0..8 is accepted, the model's images"),
    ("--config.reconstruct.sweeps=0", "config.reconstruct.sweeps is 0; an integer from 1"),
    ("--config.dynamic", "config.tune: finetuning needs static shifts"),
  ],
)
def test_refusals(argument, message, tmp_path):
  ended = start(*TUNE, argument, f"--workdir={tmp_path}")
  assert ended.status == 1
  assert message in ended.error
