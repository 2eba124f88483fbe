"""Settings that make no sense are refused by name."""

import dataclasses

import pytest

from flexiq_jax.finetuning import FinetuneSettings, ImageSettings

SETTINGS = FinetuneSettings(steps=200, every=50, refit=100)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate is 0.0; a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"output_weight": -1}, "output_weight is -1; a number from 0"),
    ({"balance": 1.5}, "balance is 1.5; a number in 0..1"),
    ({"interpolate": 0.0}, "interpolate is 0.0; a number above 0, up to 1"),
    ({"interpolate": float("nan")}, "interpolate is nan"),
    ({"steps": 250, "every": 100}, "steps is 250; a multiple of every"),
    ({"ratios": (0.5, 1.5)}, r"ratios is \(0.5, 1.5\); a tuple of numbers in 0..1"),
    ({"anchors": 0.5}, "anchors is 0.5"),
    ({"loss": "mse"}, "loss: 'mse' is not one of kl, l2"),
    ({"warmup": 200}, "warmup is 200; fewer than steps"),
    ({"batch_size": True}, "batch_size is True"),
  ],
)
def test_settings_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"images": -1}, "images is -1; an integer from 0"),
    ({"crop": 12.5}, "crop is 12.5; an integer from 0"),
  ],
)
def test_settings_of_images_that_make_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    ImageSettings(**changes)
