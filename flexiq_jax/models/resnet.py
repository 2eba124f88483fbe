"""ResNets: the ImageNet networks of torchvision and the small CIFAR networks of the original paper.

He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition" (CVPR 2016), sections 3.4, 4.1
(ImageNet) and 4.2 (CIFAR). Module names are torchvision's, so weights and layer names read as
`layer1/0/conv1/kernel`.

| network           | block      | depths     | widths            | stem               | shortcut |
|-------------------|------------|------------|-------------------|--------------------|----------|
| ResNet-18         | basic      | 2, 2, 2, 2 | 64, 128, 256, 512 | 7x7 / 2, pool 3 / 2 | B       |
| ResNet-34         | basic      | 3, 4, 6, 3 | 64, 128, 256, 512 | 7x7 / 2, pool 3 / 2 | B       |
| ResNet-50         | bottleneck | 3, 4, 6, 3 | 64, 128, 256, 512 | 7x7 / 2, pool 3 / 2 | B       |
| CIFAR ResNet-6n+2 | basic      | n, n, n    | 16, 32, 64        | 3x3 / 1            | A        |

Shortcut A subsamples and pads the channels with zeros, so that it has no parameters; B is a strided
1x1 convolution. The bottleneck strides in its 3x3 convolution (torchvision, "v1.5"), not in the
first 1x1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models import layers

EXPANSION = {"basic": 1, "bottleneck": 4}
STEMS = ("imagenet", "cifar")
SHORTCUTS = ("A", "B")


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions around a shortcut (figure 2 of the paper).

  Args:
    in_features: input channels.
    features: channels of both convolutions, and of the output.
    stride: stride of the first convolution.
    shortcut: 'A' (zero padding) or 'B' (1x1 convolution) where the shape changes.
    dtype: compute dtype.
    rngs: source of the initial weights.
  """

  def __init__(self, in_features, features, *, stride, shortcut, dtype, rngs):
    args = {"dtype": dtype, "rngs": rngs}
    self.conv1 = layers.conv(in_features, features, 3, stride=stride, **args)
    self.bn1 = layers.batch_norm(features, **args)
    self.conv2 = layers.conv(features, features, 3, **args)
    self.bn2 = layers.batch_norm(features, **args)
    self.downsample = _projection(in_features, features, stride, shortcut, **args)
    self.features = features
    self.stride = stride

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jax.nn.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return jax.nn.relu(y + _shortcut(self, x))


class Bottleneck(nnx.Module):
  """1x1, 3x3 and 1x1 convolution around a shortcut (figure 5, right); output 4 x `features`."""

  def __init__(self, in_features, features, *, stride, shortcut, dtype, rngs):
    out_features = EXPANSION["bottleneck"] * features
    args = {"dtype": dtype, "rngs": rngs}
    self.conv1 = layers.conv(in_features, features, 1, **args)
    self.bn1 = layers.batch_norm(features, **args)
    self.conv2 = layers.conv(features, features, 3, stride=stride, **args)
    self.bn2 = layers.batch_norm(features, **args)
    self.conv3 = layers.conv(features, out_features, 1, **args)
    self.bn3 = layers.batch_norm(out_features, **args)
    self.downsample = _projection(in_features, out_features, stride, shortcut, **args)
    self.features = out_features
    self.stride = stride

  def __call__(self, x: jax.Array) -> jax.Array:
    y = jax.nn.relu(self.bn1(self.conv1(x)))
    y = jax.nn.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    return jax.nn.relu(y + _shortcut(self, x))


class ResNet(nnx.Module):
  """A residual network for images [B, H, W, in_channels] of any size.

  Args:
    block: 'basic' or 'bottleneck'.
    depths: number of blocks in each stage; every stage after the first halves the image.
    width: channels of the first stage; each further stage doubles them.
    stem: 'imagenet' (7x7 stride 2, max pool) or 'cifar' (3x3 stride 1).
    shortcut: 'A' or 'B', see the module docstring.
    num_classes: outputs of the linear head.
    in_channels: channels of the images.
    input_size: height and width that `input_shape` reports; the network itself takes any.
    dtype: compute dtype, float32 or bfloat16; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: an argument is outside what is accepted; the message names it.
  """

  def __init__(
    self,
    *,
    block: str,
    depths: tuple[int, ...],
    width: int = 64,
    stem: str = "imagenet",
    shortcut: str = "B",
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    for name, value, accepted in (
      ("block", block, EXPANSION),
      ("stem", stem, STEMS),
      ("shortcut", shortcut, SHORTCUTS),
    ):
      if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")
    layers.check_positive(
      depths=depths,
      width=width,
      num_classes=num_classes,
      in_channels=in_channels,
      input_size=input_size,
    )
    if len(depths) > 4:
      raise ValueError(f"depths={depths!r} has {len(depths)} stages; accepted: one to four")
    if shortcut == "A" and width % 2:
      raise ValueError(f"width={width} is odd; shortcut A pads both sides alike and needs it even")
    args = {"dtype": dtype, "rngs": rngs}
    make_block = BasicBlock if block == "basic" else Bottleneck

    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv1 = layers.conv(in_channels, width, kernel, stride=stride, **args)
    self.bn1 = layers.batch_norm(width, **args)
    features = width
    for stage, depth in enumerate(depths):
      blocks: list[BasicBlock | Bottleneck] = []
      for index in range(depth):
        stride = 2 if stage > 0 and index == 0 else 1
        blocks.append(
          make_block(features, width << stage, stride=stride, shortcut=shortcut, **args)
        )
        features = blocks[-1].features
      setattr(self, f"layer{stage + 1}", nnx.List(blocks))
    self.fc = layers.linear(features, num_classes, **args)
    self.num_stages = len(depths)
    self.stem = stem
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, H, W, in_channels]."""
    layers.check_images(x, self.input_shape, exact=False)
    x = jax.nn.relu(self.bn1(self.conv1(x)))
    if self.stem == "imagenet":
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage in range(self.num_stages):
      for block in getattr(self, f"layer{stage + 1}"):
        x = block(x)
    return self.fc(jnp.mean(x, axis=(1, 2)))


def _projection(in_features, out_features, stride, shortcut, **args) -> nnx.List | None:
  """The 1x1 convolution and batch norm of shortcut B, or None where the input passes as it is."""
  if shortcut == "A" or (stride == 1 and in_features == out_features):
    return None
  return nnx.List(
    [
      layers.conv(in_features, out_features, 1, stride=stride, **args),
      layers.batch_norm(out_features, **args),
    ]
  )


def _shortcut(block: BasicBlock | Bottleneck, x: jax.Array) -> jax.Array:
  """What a block adds to its last batch norm: projection, padded subsample or `x` itself."""
  if block.downsample is not None:
    convolution, norm = block.downsample
    return norm(convolution(x))
  missing = block.features - x.shape[-1]
  if block.stride == 1 and missing == 0:
    return x
  x = x[:, :: block.stride, :: block.stride, :]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
