"""SqueezeNet 1.0 and 1.1: fire modules, each of which joins two branches of convolutions.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters" (2016), table 1, and
the authors' version 1.1 with fewer MACs; torchvision's module names (`features/3/squeeze/kernel`).

A fire module squeezes the channels by 1x1 and expands them by 1x1 and by 3x3 side by side; the next
layer sees the channels of both branches. No layer has a batch norm, all have a bias. The stem does
not pad, and pooling rounds the sizes up (`ceil_mode` of torch). The head computes its logits at
every position and takes their mean; dropout in front of it, which acts in training alone, is left
out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models import layers

# Stages, each after a max pool, of fires (squeezed channels, channels of each branch).
SQUEEZENET_1_0 = (
  ((16, 64), (16, 64), (32, 128)),
  ((32, 128), (48, 192), (48, 192), (64, 256)),
  ((64, 256),),
)
SQUEEZENET_1_1 = (
  ((16, 64), (16, 64)),
  ((32, 128), (32, 128)),
  ((48, 192), (48, 192), (64, 256), (64, 256)),
)


class Fire(nnx.Module):
  """1x1, then 1x1 and 3x3 side by side (figure 1 of the paper); output 2 x `features`."""

  def __init__(self, in_features, squeezed, features, *, dtype, rngs):
    args = {"use_bias": True, "dtype": dtype, "rngs": rngs}
    self.squeeze = layers.conv(in_features, squeezed, 1, **args)
    self.expand1x1 = layers.conv(squeezed, features, 1, **args)
    self.expand3x3 = layers.conv(squeezed, features, 3, **args)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(self.squeeze(x))
    branches = (jax.nn.relu(self.expand1x1(x)), jax.nn.relu(self.expand3x3(x)))
    return jnp.concatenate(branches, axis=-1)


class SqueezeNet(nnx.Module):
  """A SqueezeNet for images [B, H, W, in_channels] of any size.

  Args:
    stages: rows of fires (squeezed channels, channels of each branch), a max pool before each row.
    width: channels of the stem.
    kernel: height and width of the stem's window, which moves by 2.
    num_classes: outputs of the head.
    in_channels: channels of the images.
    input_size: height and width that `input_shape` reports.
    dtype: compute dtype; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: an argument is outside what is accepted; the message names it.
  """

  def __init__(
    self,
    *,
    stages: tuple[tuple[tuple[int, int], ...], ...],
    width: int,
    kernel: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_positive(
      width=width,
      kernel=kernel,
      num_classes=num_classes,
      in_channels=in_channels,
      input_size=input_size,
    )
    if not stages:
      raise ValueError("stages is empty; accepted: at least one row of fires")
    args = {"dtype": dtype, "rngs": rngs}
    stem = layers.conv(in_channels, width, kernel, stride=2, padding="valid", use_bias=True, **args)
    # As torch's Sequential has them, so that the numbers are those of its names.
    modules: list[Any] = [stem, jax.nn.relu]
    features = width
    for index, stage in enumerate(stages):
      modules.append(layers.max_pool_ceil)
      for fire in stage:
        layers.check_positive(**{f"stages[{index}]": tuple(fire)})
        squeezed, expanded = fire
        modules.append(Fire(features, squeezed, expanded, **args))
        features = 2 * expanded
    self.features = nnx.List(modules)
    # A 1x1 convolution, which is a linear layer at every position.
    self.classifier = layers.linear(features, num_classes, **args)
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, H, W, in_channels]."""
    layers.check_images(x, self.input_shape, exact=False)
    for module in self.features:
      x = module(x)
    return jnp.mean(jax.nn.relu(self.classifier(x)), axis=(1, 2))
