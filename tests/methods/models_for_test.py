"""A small calibrated network of every kind of layer, with labels, for layer-wise methods."""

import copy
import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from flexiq_jax import graph
from flexiq_jax.methods import layerwise
from flexiq_jax.methods.examples import Examples
from flexiq_jax.network import Network
from flexiq_jax.quant import calibration
from flexiq_jax.quant.calibration import RangeSettings, Values
from tests.search import networks_for_test as networks

NAMES = ("stem", "depth", "conv", "up", "down", "head")


@dataclasses.dataclass(frozen=True)
class Made:
  """A float network and what calibration saw of it."""

  network: Network
  values: Mapping[str, Values]
  ranges: RangeSettings
  images: np.ndarray
  labels: np.ndarray

  @property
  def examples(self) -> Examples:
    """Images and labels."""
    return Examples(self.images, self.labels)

  def stacks(self, bits, **options) -> layerwise.Stacks:
    return layerwise.create(
      *(self.network.layers, self.network.weights, self.values, self.ranges),
      bits=bits,
      **options,
    )


@functools.cache
def made() -> Made:
  """Random weights and images; the labels are mostly what the network predicts."""
  rng = np.random.default_rng(1)
  images = rng.normal(size=(networks.IMAGES, 8, 8, 3)).astype(np.float32)
  network = Network(networks.apply, networks.parameters(), images[:1])
  ranges = RangeSettings()
  values = calibration.observe_values(network.apply, network.params, [images])
  labels = np.asarray(network.float(images)).argmax(axis=1).astype(np.int32)
  labels[::4] = rng.integers(0, networks.CLASSES, len(labels[::4]))
  return Made(network, values, ranges, images, labels)


@functools.cache
def layerwise_model(bits) -> layerwise.Layerwise:
  m = made()
  return layerwise.Layerwise(m.network.apply, m.network.params, m.stacks(bits))


def run_with(weights, x):
  """The float model with some weights replaced."""
  m = made()

  def rule(layer, x, w, contract):
    return contract(x, weights.get(layer.name, w))

  return graph.with_rule(m.network.apply, rule)(m.network.params, x)


def errors_of(name, bits):
  """Q_b(W) - W for each width, by the canonical form, in NumPy."""
  m, stack = made(), layerwise_model(bits).stacks.stack(name)
  layer, w = m.network.layer(name), np.asarray(m.network.weights[name], np.float64)
  canonical, out = layer.canonical(w), []
  for codes, scale in zip(np.asarray(stack.w), np.asarray(stack.w_scale, np.float64), strict=True):
    c = layer.canonical(codes.astype(np.float64))
    for g in range(layer.groups):
      for n in range(layer.out_channels // layer.groups):
        c[g, :, :, n] *= scale[g * (layer.out_channels // layer.groups) + n]
    out.append(layer.native(c - canonical))
  return np.stack(out)


def changed(**attributes) -> Network:
  """The network with other attributes, such as its parameters."""
  network = copy.copy(made().network)
  vars(network).update(attributes)
  return network
