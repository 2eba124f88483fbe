"""The values of a config."""

import pytest

from configs import common
from experiments.shared import checks


def config(**changes):
  made = common.defaults("test", "resnet8")
  made.update_from_flattened_dict(changes)
  return made.lock()


def test_ratios_are_sorted_and_unique():
  assert checks.check(config(ratios=(1, 0.5, 0.0, 0.5))).ratios == (0.0, 0.5, 1.0)


def test_what_is_not_given_is_the_models_own():
  ours = checks.check(config()).preprocess
  assert (ours.resize, ours.crop, ours.mean) == (None, 8, (0.305,))
  theirs = checks.check(config(model="deit_s", **{"preprocess.resize": 0})).preprocess
  assert (theirs.resize, theirs.crop, theirs.interpolation) == (None, 224, "bicubic")


@pytest.mark.parametrize(
  ("raised", "told"),
  [
    (ValueError("epochs is 0; more is accepted"), "config.train.epochs is 0; more is accepted"),
    (ValueError("epochs: 0"), "config.train.epochs: 0"),
    (ValueError("loss is nan in epoch 1"), "config.train: loss is nan in epoch 1"),
    (FileNotFoundError("no file x"), "config.train: no file x"),
    (ValueError("config.data: gone"), "config.data: gone"),
  ],
)
def test_errors_name_the_field(raised, told):
  with (
    pytest.raises(ValueError) as error,
    checks.field("config.train", {"epochs": 1}),
  ):
    raise raised
  assert str(error.value) == told


def test_other_errors_pass():
  with pytest.raises(KeyError), checks.field("config"):
    raise KeyError("bug")
