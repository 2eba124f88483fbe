"""Schedule, optimizer and augmentation against their formulas, and every setting's refusal."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.training.settings import (
  TrainSettings,
  augment,
  learning_rate_schedule,
  make_optimizer,
  random_crop,
)


def test_defaults_are_the_published_cifar_recipe():
  # He et al. 2016, section 4.2.
  settings = TrainSettings()
  assert (settings.optimizer, settings.momentum, settings.weight_decay) == ("sgd", 0.9, 1e-4)
  assert (settings.batch_size, settings.learning_rate) == (128, 0.1)
  assert settings.augmentation == "crop_flip"
  assert settings.epochs * (50_000 // 128) == pytest.approx(64_000, rel=0.01)


@pytest.mark.parametrize(
  ("field", "values", "accepted"),
  [
    ("epochs", (0, 1.5, True), "an integer from 1"),
    ("batch_size", (0, -4), "an integer from 1"),
    ("checkpoint_every", (0,), "an integer from 1"),
    ("seed", (-1, 0.5), "an integer from 0"),
    ("learning_rate", (0, -0.1, math.inf, math.nan, "0.1"), "a number above 0"),
    ("warmup", (-1, 164, 200.0), "0 up to, but not, 164"),
    ("weight_decay", (-1e-4,), "a number from 0"),
    ("momentum", (-0.1, 1.0), "0 up to, but not, 1"),
    ("label_smoothing", (-0.1, 1.0), "0 up to, but not, 1"),
    ("held_out", (-0.1, 0.6), "0 to 0.5"),
    ("optimizer", ("adam",), "sgd or adamw"),
    ("augmentation", ("flip",), "none or shift or crop_flip"),
  ],
)
def test_every_setting_is_checked_by_name(field, values, accepted):
  for value in values:
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; {accepted} is accepted"):
      TrainSettings(**{field: value})


def test_schedule_by_hand():
  settings = TrainSettings(epochs=10, warmup=2.0, learning_rate=0.4)
  schedule = learning_rate_schedule(settings, 5)  # 10 steps of warm-up, 50 in all
  got = [float(schedule(step)) for step in (0, 4, 9, 10, 20, 30, 50)]
  want = [0.04, 0.2, 0.4, 0.4, 0.2 * (1 + math.cos(math.pi / 4)), 0.2, 0.0]
  np.testing.assert_allclose(got, want, atol=1e-7)
  flat = learning_rate_schedule(dataclasses.replace(settings, warmup=0), 5)
  np.testing.assert_allclose([float(flat(0)), float(flat(25))], [0.4, 0.2], atol=1e-7)


def test_sgd_is_momentum_with_l2_on_kernels_only():
  settings = TrainSettings(weight_decay=0.5, momentum=0.9)
  optimizer = make_optimizer(settings, lambda step: 0.1)
  params = {"kernel": jnp.full((1, 2), 2.0), "bias": jnp.full(2, 2.0)}
  gradient = jax.tree.map(jnp.ones_like, params)
  state = optimizer.init(params)
  first, state = optimizer.update(gradient, state, params)
  second, _ = optimizer.update(gradient, state, params)
  # Gradient 1, plus 0.5 * 2 for the kernel; the second step adds 0.9 of the first.
  np.testing.assert_allclose(first["kernel"], [[-0.2, -0.2]], rtol=1e-6)
  np.testing.assert_allclose(first["bias"], [-0.1, -0.1], rtol=1e-6)
  np.testing.assert_allclose(second["kernel"], [[-0.38, -0.38]], rtol=1e-6)
  np.testing.assert_allclose(second["bias"], [-0.19, -0.19], rtol=1e-6)


def test_adamw_decays_kernels_only():
  settings = TrainSettings(weight_decay=0.5, optimizer="adamw")
  optimizer = make_optimizer(settings, lambda step: 0.1)
  params = {"kernel": jnp.full((1, 2), 2.0), "bias": jnp.full(2, 2.0)}
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  np.testing.assert_allclose(updates["kernel"], [[-0.1, -0.1]], rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], [0, 0])


def _shifts(image, pad, flip):
  """All images that a crop from `pad` pixels of black padding can give, by offset and flip."""
  height, width, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  found = {}
  for y in range(2 * pad + 1):
    for x in range(2 * pad + 1):
      crop = padded[y : y + height, x : x + width]
      for flipped in (False, True) if flip else (False,):
        found[(crop[:, ::-1] if flipped else crop).tobytes()] = (y, x, flipped)
  return found


@pytest.mark.parametrize(("name", "pad", "flip"), [("shift", 1, False), ("crop_flip", 4, True)])
def test_augmentation_draws_every_crop_and_nothing_else(name, pad, flip):
  image = np.random.default_rng(0).integers(1, 256, (9, 7, 3), dtype=np.uint8)
  possible = _shifts(image, pad, flip)
  assert len(possible) == (2 * pad + 1) ** 2 * (1 + flip)
  images = jnp.asarray(np.broadcast_to(image, (2000, *image.shape)))
  got = np.asarray(jax.jit(augment, static_argnums=2)(jax.random.key(0), images, name))
  assert got.dtype == np.uint8
  drawn = [possible[crop.tobytes()] for crop in got]  # a KeyError is an impossible crop
  assert len(set(drawn)) == len(possible)
  if flip:
    assert 0.45 < np.mean([flipped for *_, flipped in drawn]) < 0.55
  same = np.asarray(augment(jax.random.key(0), images, name))
  np.testing.assert_array_equal(got, same)
  other = np.asarray(augment(jax.random.key(1), images, name))
  assert (got != other).any()


def test_no_augmentation_is_the_identity():
  images = jnp.arange(12, dtype=jnp.uint8).reshape(1, 2, 2, 3)
  np.testing.assert_array_equal(augment(jax.random.key(0), images, "none"), images)


@pytest.mark.parametrize("size", [5, 7])
def test_random_crops_are_all_parts_and_nothing_else(size):
  image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
  possible = {
    image[y : y + size, x : x + size].tobytes() for y in range(10 - size) for x in range(8 - size)
  }
  images = jnp.asarray(np.broadcast_to(image, (500, *image.shape)))
  got = np.asarray(jax.jit(random_crop, static_argnums=2)(jax.random.key(0), images, (size, size)))
  assert got.shape == (500, size, size, 3) and got.dtype == np.uint8
  assert {crop.tobytes() for crop in got} == possible
