"""Fields that came later do not make kept runs other ones."""

import functools
import operator

import pytest

from configs import resnet20_cifar10
from experiments.shared import identity, setup
from flexiq_jax.runs import files
from flexiq_jax.runs.workdir import Workdir


@pytest.fixture
def config():
  return resnet20_cifar10.get_config("runlocal")


def older(config):
  """The config of a run from before there were the fields."""
  found = config.to_dict()
  for name in identity.LATER:
    *sections, field = name.split(".")
    del functools.reduce(operator.getitem, sections, found)[field]
  return found


def test_a_run_from_before_a_field_goes_on(config, tmp_path):
  workdir = Workdir(tmp_path)
  workdir.config(older(config))
  assert workdir.config(identity.plain(config))
  assert setup.provenance(config)["config"].endswith(files.digest(older(config)))


def test_another_value_is_another_run(config, tmp_path):
  Workdir(tmp_path).config(older(config))
  config.distill.interpolate = 0.5
  assert identity.plain(config)["distill"]["interpolate"] == 0.5
  with pytest.raises(ValueError, match=r"distill\.interpolate was absent, is now 0\.5"):
    Workdir(tmp_path).config(identity.plain(config))


def test_the_config_itself_stays(config):
  identity.plain(config)
  assert config.finetune.interpolate == 1.0
