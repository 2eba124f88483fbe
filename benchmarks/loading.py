"""Models for the benchmarks of searches: calibrated, lowered, scored, with images to search on."""

import dataclasses
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import setup
from flexiq_jax import models
from flexiq_jax.calibrated import calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import Space
from flexiq_jax.quant import LowSettings, RangeSettings, rules, selectable

Array = Any

CONFIGS = {"resnet20": "configs.resnet20_cifar10", "vit_cifar10": "configs.vit_cifar10"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """What a search starts from.

  Attributes:
    network: the float model.
    model: its quantized layers, selectable ones with their 4-bit side.
    space: the channel groups.
    scores: float `[T]`, error of each group alone.
    images: float32 `[n, H, W, C]`, calibration images.
    pretrained: whether the weights are trained ones; speed is all that random ones tell.
  """

  network: Network
  model: rules.QModel
  space: Space
  scores: np.ndarray
  images: np.ndarray
  pretrained: bool


def has_data() -> bool:
  """Whether there are pretrained weights and images."""
  return bool(os.environ.get("FLEXIQ_DATA"))


def pretrained(name: str, images: int | None = None) -> Loaded:
  """A pretrained model as its config quantizes it.

  Args:
    name: a key of `CONFIGS`.
    images: how many images to calibrate on; as many as the config says if None.

  Raises:
    ValueError: weights or images are missing.
  """
  config = importlib.import_module(CONFIGS[name]).get_config()
  if images is not None:
    config.calibration.images = images
  inputs = setup.prepare(config)
  apply, _ = models.functional(inputs.module)
  x = jax.ShapeDtypeStruct((1, *inputs.module.input_shape), jnp.float32)
  network = Network(apply, inputs.params, x)
  batches, _ = inputs.calibration_set
  settings = inputs.settings
  return _loaded(network, batches, inputs.selectable, settings.ranges, settings.groups, True)


def random(name: str, images: int, **overrides: Any) -> Loaded:
  """A model with random weights, calibrated on noise.

  Args:
    name: a name in `flexiq_jax.models.MODELS`.
    images: how many.
    **overrides: of the model's arguments.
  """
  module: Any = models.create(name, **overrides)
  apply, params = models.functional(module)
  x = jax.random.normal(jax.random.key(0), (images, *module.input_shape), jnp.float32)
  network = Network(apply, params, x[:1])
  names = selectable(network.layers)
  ranges, groups = RangeSettings(), LowSettings()
  return _loaded(network, [np.asarray(x)], names, ranges, groups, False)


def _loaded(network, batches, names, ranges, settings, pretrained: bool) -> Loaded:
  grouped = calibrate(network, batches, ranges).group(names, settings)
  return Loaded(
    network=network,
    model=grouped.model,
    space=grouped.space,
    scores=grouped.scores(),
    images=np.concatenate(batches),
    pretrained=pretrained,
  )
