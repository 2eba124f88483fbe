"""Reconstruction: smaller errors on other images, codes as found, and layers that stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexiq_jax as fq
from flexiq_jax import adaptive, finetuning, flexiq
from flexiq_jax.finetuning import ReconstructionSettings, reconstruction
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings
from tests.layers_for_test import CASES

SETTINGS = ReconstructionSettings()


def model_of(apply, params, x):
  """Quantized with all layers selectable, groups of 2 channels."""
  network = Network(apply, params, x[:1])
  names = [layer.name for layer in network.layers]
  settings = LowSettings(group_size=2)
  return flexiq.quantize(network, [x], names=names, settings=settings, progress=False)


def correlated(seed, *shape):
  """Activations whose channels have to do with each other, as those of networks have."""
  rng = np.random.default_rng(seed)
  mix = np.random.default_rng(0).normal(size=(shape[-1], shape[-1]))
  return (rng.normal(size=shape) @ mix).astype(np.float32)


def weights(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def start():
  def apply(params, x):
    conv = jax.lax.conv_general_dilated(
      *(x, params["conv"], (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hidden = jax.nn.relu(conv).mean(axis=(1, 2))
    # As it is, transposed, and as a product.
    first, second = hidden @ params["dense"], hidden @ params["turned"].T
    return (first + second) @ (7 * params["product"])

  params = {
    "conv": weights(1, 3, 3, 6, 12),
    "dense": weights(2, 12, 8),
    "turned": weights(3, 8, 12),
    "product": weights(4, 8, 5),
  }
  x = correlated(5, 64, 6, 6, 6)
  return model_of(apply, params, x), x


@pytest.fixture(scope="module")
def made(start):
  model, x = start
  told = []
  found, errors = finetuning.reconstruct(
    model, [x[:32], x[32:]], SETTINGS, lambda what, done: told.append((what, done))
  )
  return found, errors, told


def test_logits_come_nearer_on_other_examples(start, made):
  """Not at every ratio for itself: each layer is rounded by its own outputs."""
  model, other = start[0], correlated(6, 256, 6, 6, 6)
  wanted = np.asarray(model.network.float(other))
  distance = lambda m, ratio: np.square(np.asarray(m(other, ratio)) - wanted).mean()
  left = [distance(made[0], r) / distance(model, r) for r in SETTINGS.ratios]
  assert left[0] < 1 and left[-1] < 1 and np.mean(left) < 0.97, left


@pytest.mark.parametrize("bias_correction", [True, False])
def test_means_of_the_outputs_stay(bias_correction):
  """Activations that are far from zero: a rounding that looks at variances alone moves the mean."""
  x = np.maximum(correlated(7, 512, 16) + 10, 0)
  network = Network(lambda p, x: jax.nn.relu(x) @ p["w"], {"w": weights(8, 16, 24)}, x[:1])
  settings = LowSettings(group_size=2, bias_correction=bias_correction)
  model = flexiq.quantize(network, [x], names=["w"], settings=settings, progress=False)
  found, _ = finetuning.reconstruct(model, [x], SETTINGS)
  wanted = np.asarray(network.float(x))

  def mean_error(m, ratio):
    return np.square((np.asarray(m(x, ratio)) - wanted).mean(axis=0)).sum()

  assert mean_error(found, 0.0) < 2 * mean_error(model, 0.0)
  assert mean_error(found, 1.0) < 2 * mean_error(model, 1.0)


def test_errors_say_what_was_gained(made):
  _, errors, told = made
  assert set(errors) == {"conv", "dense", "turned", "product"}
  assert all(set(by_ratio) == {0.0, 0.25, 0.5, 0.75, 1.0} for by_ratio in errors.values())
  assert all(sum(by_ratio.values()) < 5 for by_ratio in errors.values())
  assert told[:2] == [("moments at 0 %", 32), ("moments at 0 %", 64)]
  assert told[-1] == ("rounding", 64)


def test_order_groups_and_scales_stay(start, made):
  model, found = start[0], made[0]
  assert np.array_equal(found.schedule.order, model.schedule.order)
  for name, q in model.model.items():
    assert np.array_equal(q.x_scale, found.model[name].x_scale)
    assert np.array_equal(q.w_scale, found.model[name].w_scale)


def test_every_layer_gets_the_codes_that_were_found(start, made):
  model, found = start[0], made[0]
  for name, q in model.model.items():
    old, new = np.asarray(q.w, int), np.asarray(found.model[name].w, int)
    assert 0 < np.abs(old - new).max() < 40, name


def test_files_give_the_model_again(start, made, tmp_path):
  model, x = start
  found = made[0]
  recipe = found.recipe(model_name="small", method="reconstruct", seed=0)
  adaptive.save(tmp_path / "recipe.json", recipe, found)
  again = adaptive.load(tmp_path / "recipe.json", model.network)
  for ratio in (0.0, 0.4, 1.0):
    assert np.array_equal(found(x, ratio), again(x, ratio))


def test_layers_with_contraction_groups_stay():
  def apply(params, x):
    y = jnp.einsum("bhd,hde->bhe", x, params["heads"])
    return y.reshape(len(y), -1) @ params["out"]

  x = correlated(1, 32, 2, 6)
  params = {"heads": weights(2, 2, 6, 6), "out": weights(3, 12, 4)}
  model = model_of(apply, params, x)
  found, errors = finetuning.reconstruct(model, [x], SETTINGS)
  assert set(errors) == {"out"}
  assert np.array_equal(model.model["heads"].w, found.model["heads"].w)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.layer.groups == 1])
def test_rows_times_weights_are_the_layers_outputs(name):
  case = CASES[name]
  layer, contract = case.given_to_a_rule
  rng = np.random.default_rng(0)
  x, w = rng.integers(-9, 9, case.x), rng.integers(-9, 9, case.w)
  rows = np.asarray(reconstruction._rows(layer, jnp.asarray(x, jnp.float32), contract))
  found = rows @ layer.canonical(w).reshape(rows.shape[1], -1)
  y = case.exact(x, w)
  rest = [d for d in range(y.ndim) if d not in layer.y_dims]
  assert np.array_equal(found, y.transpose(*rest, *layer.y_dims).reshape(found.shape))


def test_what_does_not_do_is_refused(start):
  model, x = start
  with pytest.raises(ValueError, match="batches: none"):
    finetuning.reconstruct(model, [], SETTINGS)
  with pytest.raises(ValueError, match="model: dynamic shifts"):
    finetuning.reconstruct(dataclasses.replace(model, dynamic=True), [x], SETTINGS)
  with pytest.raises(ValueError, match=r"ratios is \(2,\); a tuple of numbers in 0..1"):
    ReconstructionSettings(ratios=(2,))
  with pytest.raises(ValueError, match=r"ratios is \(\); at least one"):
    ReconstructionSettings(ratios=())
  with pytest.raises(ValueError, match="sweeps is 0; an integer from 1"):
    ReconstructionSettings(sweeps=0)


def test_the_short_way(start):
  model, x = start
  found = fq.reconstruct(model, progress=False)  # on what it was calibrated on
  again, _ = finetuning.reconstruct(model, [x], SETTINGS)
  assert all(np.array_equal(q.w, again.model[name].w) for name, q in found.model.items())
  assert found.drops and found.w_scales is not None
  alone = dataclasses.replace(model, grouped=None)
  with pytest.raises(ValueError, match="batches: missing"):
    fq.reconstruct(alone, progress=False)


def test_finetuning_goes_on_from_there_with_the_float_model_as_its_teacher(start, made):
  """Without a step to speak of the reconstruction remains; the loss is from the float model."""
  model, x = start
  rates = ("learning_rate", "other_learning_rate", "scale_learning_rate")
  tiny = {**dict.fromkeys(rates, 1e-12), "warmup": 0, "refit": 0}
  settings = finetuning.FinetuneSettings(
    **tiny, steps=1, every=1, batch_size=64, anchors=(1.0,), ratios=(1.0,), reconstruct=True
  )
  tuned, log = finetuning.finetune(model, finetuning.Examples(x), [x[:32], x[32:]], settings)
  for name, q in made[0].model.items():
    assert np.array_equal(q.w, tuned.model[name].w)
  distance = np.square(np.asarray(made[0](x, 1.0)) - np.asarray(model.network.float(x)))
  assert log[0]["loss_1"] == pytest.approx(float(distance.sum(axis=1).mean()), rel=1e-4)
