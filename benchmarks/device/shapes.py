"""The products and convolutions of DeiT-S, ViT-B and ResNet-50, read off their traces alone.

Nothing is calibrated: a product's time depends on its shape and its boundary, and boundaries here
are a share of its columns, in whole groups. `prepare.py` groups the deployed models alike, so that
tiles which were measured on these shapes are those that the models ask for.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.kernel_products import MODELS, Product
from flexiq_jax import graph, models
from flexiq_jax.quant import selectable

BATCHES = (1, 8, 32, 128)
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = ("deit_s", "resnet50", "vit_b")
# What a trial measures instead: a small model of each kind.
SMALL = {
  "deit_s": {"depth": 1, "input_size": 32, "width": 64, "heads": 2},
  "resnet50": {"depths": (1, 1), "input_size": 32, "width": 16},
  "vit_b": {"depth": 1, "input_size": 32, "width": 128, "heads": 2},
}


def overrides(name: str, small: bool) -> dict[str, Any]:
  """Arguments of a model: none, or those that make it small."""
  return dict(SMALL[name]) if small else {}


def group_size(name: str, platform: str, kind: str = "") -> int:
  """Channels in a group and a shift block: half a tile of the GPU kernel, a TPU's matrix unit."""
  if platform == "tpu":
    return MODELS[name]["v6e" if "v6" in kind else "v5e"]
  return 64


def granule(platform: str) -> int:
  """Rows of K that a shift block is a multiple of (see `deployment.deploy`)."""
  return {"tpu": 128, "gpu": 64}.get(platform, 2)


def abstract(name: str, small: bool = False) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
  """`apply`, the shapes of the parameters, and that of one input."""
  module: Any = nnx.eval_shape(lambda: models.create(name, **overrides(name, small)))
  apply, params = models.functional(module)
  return apply, params, jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)


@functools.cache
def layers_of(name: str, small: bool) -> tuple[graph.Layer, ...]:
  """A model's layers; tracing one takes seconds, and every device's products begin with it."""
  return tuple(graph.layers(*abstract(name, small)))


def products(name: str, platform: str, kind: str = "", small: bool = False) -> list[Product]:
  """A model's mixed products, most arithmetic first; one for each shape, named after its layers.

  Args:
    name: of the model.
    platform: gpu, tpu or cpu.
    kind: of the device.
    small: of the model's small form.
  """
  found: dict[tuple[int, int, int, int], Product] = {}
  layers = layers_of(name, small)
  chosen = {*selectable(layers)}
  for layer in layers:
    if layer.name not in chosen:
      continue
    taps = math.prod(layer.window)
    group = min(group_size(name, platform, kind), layer.in_channels)
    step = granule(platform)
    block = -(-group * taps // step) * step
    blocks = -(-layer.in_channels // group)
    k, n = blocks * block, layer.out_channels
    m = layer.macs // layer.params
    key = (m, k, n, block)
    if key in found:
      found[key] = dataclasses.replace(found[key], name=f"{found[key].name},{layer.name}")
      continue
    found[key] = Product(
      name=layer.name,
      m=m,
      k=k,
      n=n,
      block=block,
      boundaries=tuple(round(level * blocks) * block for level in LEVELS),
      prepares=False,
      channels=layer.in_channels,
      taps=taps,
      activation="none",
      next_boundaries=None,
    )
  work = lambda p: p.m * p.k * p.n * (1 + p.name.count(","))
  return sorted(found.values(), key=work, reverse=True)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Convolution:
  """A convolution of a square image with padding that keeps it, before the stride.

  Attributes:
    side: of the image.
    channels, outputs: C and N.
    window: its side.
    stride: in both directions.
    count: how many layers of the model are so.
  """

  side: int
  channels: int
  outputs: int
  window: int
  stride: int
  count: int = 1

  def __str__(self) -> str:
    w, s = self.window, f", stride {self.stride}" if self.stride > 1 else ""
    return f"{w} x {w}, {self.side} x {self.side} x {self.channels} -> {self.outputs}{s}"


# ResNet-50's, those that take most of its time first; the stem is among them, all its layers run in
# 8 bits at least.
CONVOLUTIONS = (
  Convolution(side=56, channels=64, outputs=64, window=3, stride=1, count=3),
  Convolution(side=14, channels=256, outputs=256, window=3, stride=1, count=5),
  Convolution(side=28, channels=128, outputs=128, window=3, stride=1, count=3),
  Convolution(side=7, channels=512, outputs=512, window=3, stride=1, count=2),
  Convolution(side=224, channels=3, outputs=64, window=7, stride=2),
  Convolution(side=56, channels=64, outputs=256, window=1, stride=1, count=4),
  Convolution(side=56, channels=128, outputs=128, window=3, stride=2),
  Convolution(side=14, channels=1024, outputs=256, window=1, stride=1, count=5),
  Convolution(side=28, channels=512, outputs=1024, window=1, stride=2),
)
