"""Small adaptive models and their deployed counterparts."""

import dataclasses
import functools

import jax
import numpy as np

from flexiq_jax import flexiq, models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.network import Network
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.quant.selectable import selectable

RESNET = ("resnet8", {"width": 8, "depths": (2, 1)})
WIDE = ("resnet8", {"width": 64, "depths": (1,), "input_size": 8})
BOTTLENECK = ("resnet50", {"width": 4, "depths": (1, 1), "input_size": 16, "num_classes": 5})
VIT = ("vit_cifar10", {"width": 24, "depth": 1, "heads": 2, "patch_size": 8, "input_size": 16})
MOBILE = ("mobilenet_v2", models.MODELS["mobilenet_v2"].tiny)
SWIN = ("swin_t", models.MODELS["swin_t"].tiny)
BLOCKS = LowSettings(group_size=2, shift_block=4, weight_shift_per="output")
LEVELS = (0.0, 0.3, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Made:
  model: AdaptiveModel
  x: np.ndarray

  def __call__(self, x, ratio):
    return np.asarray(self.model(x, ratio))


@functools.cache
def make(name, arguments, settings=BLOCKS, dynamic=False, depthwise=False) -> Made:
  """A model with random weights, quantized on random images; `arguments` as sorted items."""
  module = models.create(name, seed=1, **dict(arguments))
  apply, params = models.functional(module)
  x = np.asarray(jax.random.normal(jax.random.key(0), (6, *module.input_shape)), np.float32)
  network = Network(apply, params, x[:1])
  names = selectable(network.layers, depthwise=depthwise)
  model = flexiq.quantize(network, [x], names=names, settings=settings, dynamic=dynamic)
  return Made(model, x)


def made(case, **options) -> Made:
  name, arguments = case
  return make(name, tuple(sorted(arguments.items())), **options)


def exact_scales(model: AdaptiveModel) -> AdaptiveModel:
  """The same layers with scales whose product is one: results are the integer sums themselves."""
  layers = {
    name: dataclasses.replace(
      q,
      x_scale=(scale := np.float32(2.0 ** np.round(np.log2(float(q.x_scale))))),
      w_scale=np.full_like(q.w_scale, 1 / scale),
    )
    for name, q in model.model.items()
  }
  return dataclasses.replace(model, model=layers)


SHAPES = {
  "first": (3, 3, 2, 6),
  "expand": (1, 1, 6, 12),
  "depthwise": (3, 3, 1, 12),
  "project": (1, 1, 12, 6),
  "grouped": (3, 3, 3, 8),
  "last": (8, 5),
}


def own_network(p, x):
  """A network with a depthwise and a grouped convolution, as a plain function."""

  def conv(x, w, groups=1, stride=1):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  x = jax.nn.relu(conv(x, p["first"]))
  x = jax.nn.relu6(conv(x, p["expand"]))
  x = jax.nn.relu6(conv(x, p["depthwise"], groups=12, stride=2))
  x = conv(x, p["project"])
  x = jax.nn.relu(conv(x, p["grouped"], groups=2))
  return x.mean(axis=(1, 2)) @ p["last"]


@functools.cache
def ones_own(depthwise=True, settings=BLOCKS):
  """Adaptive model of `own_network`, and its images `[4, 6, 6, 2]`.

  Without `depthwise` only the 1x1 convolutions go to 4 bits.
  """
  keys = jax.random.split(jax.random.key(0), len(SHAPES))
  params = {
    n: jax.random.normal(k, s) / np.sqrt(np.prod(s[:-1]))
    for (n, s), k in zip(SHAPES.items(), keys, strict=True)
  }
  x = np.asarray(jax.random.normal(jax.random.key(1), (4, 6, 6, 2)))
  network = Network(own_network, params, x[:1])
  names = selectable(network.layers, depthwise=True) if depthwise else ("expand", "project")
  own = flexiq.quantize(network, [x], names=names, settings=settings)
  return own, x
