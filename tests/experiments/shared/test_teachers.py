"""The teacher that a config names: what it is given, what its files say, and what is refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import common
from experiments.shared import setup
from flexiq_jax import models
from flexiq_jax.orders import recipes
from tests.runs_for_test import DIGITS, TINY, compiled, start  # noqa: F401

LARGER = "--config.teacher.model=resnet8", "--config.teacher.model_args=width=16,depths=(1,)"


def config(**teacher):
  found = common.other("digits", "runlocal")
  found.weights = "random"
  found.teacher.update(teacher)
  return found


def test_no_teacher_is_the_model_itself():
  assert setup.prepare(config()).teacher is None


def test_it_sees_the_images_as_its_own_preprocessing_gives_them():
  given = config(model="resnet8", weights="random")
  given.preprocess.mean, given.preprocess.std = (0.5,), (0.4,)
  inputs = setup.prepare(given)
  apply, params = inputs.teacher
  spec = models.get("resnet8")
  own = setup.prepare(config()).settings.preprocess
  assert (own.mean, own.std) == (spec.mean, spec.std) != ((0.5,), (0.4,))
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
  module_apply, _ = models.functional(setup.prepare(config()).build())
  wanted = module_apply(params, own.normalize(images))
  found = apply(params, inputs.settings.preprocess.normalize(images))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert not np.allclose(module_apply(params, inputs.settings.preprocess.normalize(images)), wanted)


def test_a_run_is_taught_by_it(compiled, tmp_path):  # noqa: F811
  common = (DIGITS, *TINY, "--config.tune=('distill',)", "--config.distill.reconstruct=False")
  few = ("steps=2", "every=2", "refit=0", "warmup=0", "images=24", "batch_size=8")
  few = [f"--config.distill.{each}" for each in (*few, "augmentation=none")]
  more = (*few, "--config.search.method=greedy", "--config.random_seeds=()", "--config.tune_int4")
  digests = {}
  for name, teacher in {"own": (), "other": (*LARGER, "--config.teacher.weights=random")}.items():
    ended = start(*common, *more, *teacher, f"--workdir={tmp_path / name}", compiled)
    assert ended.status == 0, ended.error
    for folder in ("distill", "distill_int4"):
      assert (tmp_path / name / "finetuned" / folder).is_dir()
    kept = tmp_path / name / "finetuned/distill"
    settings = recipes.load(kept / "recipe.json").settings
    assert settings.get("teacher", {}).get("model") == (None if name == "own" else "resnet8")
    digests[name] = (kept / "finetuned.safetensors").read_bytes()
  assert digests["own"] != digests["other"]


@pytest.mark.parametrize(
  ("teacher", "message"),
  [
    ({"model": "resnet99", "weights": "random"}, r"config\.teacher\.model: "),
    ({"model": "resnet8"}, r"config\.teacher\.weights: empty; give a safetensors file, hf:"),
    ({"weights": "x.safetensors"}, r"config\.teacher\.model: empty, but its weights"),
    ({"model": "resnet20", "weights": "random"}, r"config\.teacher\.model: 'resnet20' has input_s"),
    ({"model": "resnet8", "weights": "/no/{model}.st"}, r"config\.teacher\.weights: .*/no/resnet8"),
    ({"model": "resnet8", "model_args": "widht=3"}, r"config\.teacher\.model_args: "),
  ],
)
def test_refusals(teacher, message):
  with pytest.raises(ValueError, match=message):
    setup.prepare(config(**teacher))


def test_its_weights_are_read_from_a_file(tmp_path):
  _, params = models.functional(setup.prepare(config()).build())
  as_torch = lambda w: {4: lambda: w.transpose(3, 2, 0, 1), 2: lambda: w.T}.get(w.ndim, lambda: w)()
  flat = {k: as_torch(np.asarray(v)).copy() for k, v in models.flatten(params).items()}
  save_file(flat, tmp_path / "resnet8.safetensors")
  given = config(model="resnet8", weights=str(tmp_path / "{model}.safetensors"))
  _, found = setup.prepare(given).teacher
  assert jax.tree.all(jax.tree.map(np.array_equal, params, found))
