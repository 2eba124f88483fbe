"""VGG-16, with and without batch norm: plain 3x3 convolutions and three wide linear layers.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition" (ICLR
2015), table 1, column D; torchvision's module names (`features/28/kernel`, `classifier/0/kernel`).

| part     | VGG-16                                                                      |
|----------|-----------------------------------------------------------------------------|
| features | 2, 2, 3, 3, 3 convolutions of 64, 128, 256, 512, 512 channels; a max pool   |
|          | ends each stage                                                             |
| pool     | average over windows that leave 7 x 7; of 224 x 224 pixels each is one value |
| head     | 25,088 to 4,096 to 4,096 to the classes                                     |

The head reads the map channel by channel, as torch flattens it: the 49 positions of a channel are
neighbours, so that a group of inputs has one channel's range. Its dropout, which acts in training
alone, is left out.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models import layers


class VGG(nnx.Module):
  """A VGG for images [B, H, W, in_channels] of any size.

  Args:
    depths: convolutions of each stage; a max pool ends it.
    widths: channels of each stage.
    norm: whether a batch norm follows each convolution.
    pool: height and width of the map that the head reads.
    hidden: width of the head's two hidden layers.
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
    depths: tuple[int, ...] = (2, 2, 3, 3, 3),
    widths: tuple[int, ...] = (64, 128, 256, 512, 512),
    norm: bool = False,
    pool: int = 7,
    hidden: int = 4096,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_positive(
      depths=depths,
      widths=widths,
      pool=pool,
      hidden=hidden,
      num_classes=num_classes,
      in_channels=in_channels,
      input_size=input_size,
    )
    if len(depths) != len(widths):
      raise ValueError(f"widths={widths!r} has {len(widths)} stages, depths={depths!r} others")
    args = {"dtype": dtype, "rngs": rngs}
    # As torch's Sequential has them, so that the numbers are those of its names.
    modules, features = [], in_channels
    for depth, width in zip(depths, widths, strict=True):
      for _ in range(depth):
        modules.append(layers.conv(features, width, 3, use_bias=True, **args))
        modules += [layers.batch_norm(width, **args)] if norm else []
        modules.append(jax.nn.relu)
        features = width
      modules.append(_halve)
    self.features = nnx.List(modules)
    linear = lambda inputs, outputs: layers.linear(inputs, outputs, **args)
    self.classifier = nnx.List(
      [
        *(linear(features * pool**2, hidden), jax.nn.relu, _dropped),
        *(linear(hidden, hidden), jax.nn.relu, _dropped),
        linear(hidden, num_classes),
      ]
    )
    self.pool = pool
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, H, W, in_channels]."""
    layers.check_images(x, self.input_shape, exact=False)
    for module in self.features:
      x = module(x)
    x = layers.average_pool(x, self.pool)
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    for module in self.classifier:
      x = module(x)
    return x


def _halve(x: jax.Array) -> jax.Array:
  return nnx.max_pool(x, (2, 2), strides=(2, 2))


def _dropped(x: jax.Array) -> jax.Array:
  """Dropout of the finished network: nothing."""
  return x
