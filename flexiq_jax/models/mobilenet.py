"""Mobile networks of inverted residuals: MobileNetV2 and EfficientNet-Lite0.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), table 2, with
torchvision's module names (`features/4/conv/1/0/kernel`); and EfficientNet-Lite0, the EfficientNet
(Tan and Le, ICML 2019) without squeeze-excite and with ReLU6, made for integer hardware, with
timm's names (`blocks/2/0/conv_pwl/kernel`).

An inverted residual expands the channels by 1x1, filters them depthwise, projects them back by 1x1
without an activation, and adds the input where stride and width allow. Both networks come in two
paddings, see `layers`: weights that were trained in torch want `'torch'`, those converted from
TensorFlow want `'tf_same'` (and other epsilons).

`norm=False` builds MobileNetV2 with batch norm folded away: every convolution has a bias and no
norm follows it. It is the shape of checkpoints that were exported for integer inference.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models import layers

# Rows of a stage: (expansion t, output channels c, repeats n, stride s of the first block).
MOBILENET_V2_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# The same with the kernel size k last: (t, c, n, s, k).
EFFICIENTNET_LITE0_STAGES = (
  (1, 16, 1, 1, 3),
  (6, 24, 2, 2, 3),
  (6, 40, 2, 2, 5),
  (6, 80, 3, 2, 3),
  (6, 112, 3, 1, 5),
  (6, 192, 4, 2, 5),
  (6, 320, 1, 1, 3),
)


def scale_channels(channels: int, factor: float, divisor: int = 8) -> int:
  """Channels times `factor` as a multiple of `divisor`, never below 90 % of the product."""
  rounded = max(divisor, int(channels * factor + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels * factor else rounded


class InvertedResidual(nnx.Module):
  """The block of MobileNetV2, under torchvision's names.

  `conv` is a list: [convolution, norm] for the expansion (absent at expansion 1), [convolution,
  norm] for the depthwise filter, then the projection and its norm as two plain entries. Without
  norms the lists hold the convolutions alone.
  """

  def __init__(self, in_features, features, *, expansion, stride, padding, norm, dtype, rngs):
    hidden = in_features * expansion
    args = {"padding": padding, "use_bias": not norm, "dtype": dtype, "rngs": rngs}

    def with_norm(convolution: nnx.Conv) -> list[nnx.Module]:
      if not norm:
        return [convolution]
      return [convolution, layers.batch_norm(convolution.out_features, dtype=dtype, rngs=rngs)]

    modules: list[nnx.Module] = []
    if expansion != 1:
      modules.append(nnx.List(with_norm(layers.conv(in_features, hidden, 1, **args))))
    depthwise = layers.conv(hidden, hidden, 3, stride=stride, groups=hidden, **args)
    modules.append(nnx.List(with_norm(depthwise)))
    self.num_activated = len(modules)
    modules.extend(with_norm(layers.conv(hidden, features, 1, **args)))
    self.conv = nnx.List(modules)
    self.residual = stride == 1 and in_features == features

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    modules = list(self.conv)
    for pair in modules[: self.num_activated]:
      y = layers.relu6(_chain(pair, y))
    y = _chain(modules[self.num_activated :], y)
    return x + y if self.residual else y


class MobileNetV2(nnx.Module):
  """MobileNetV2 for images [B, H, W, in_channels] of any size.

  Args:
    stages: rows (expansion, channels, repeats, stride).
    width_mult: factor of all channels, rounded to multiples of 8; the last layer never shrinks.
    last_channels: channels of the 1x1 convolution before pooling.
    padding: 'torch' or 'tf_same'.
    norm: False builds the variant with batch norm folded into biases.
    num_classes: outputs of the linear head.
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
    stages: tuple[tuple[int, int, int, int], ...] = MOBILENET_V2_STAGES,
    width_mult: float = 1.0,
    last_channels: int = 1280,
    padding: str = "torch",
    norm: bool = True,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check(stages, 4, padding, width_mult)
    layers.check_positive(
      last_channels=last_channels,
      num_classes=num_classes,
      in_channels=in_channels,
      input_size=input_size,
    )
    args = {"padding": padding, "dtype": dtype, "rngs": rngs}

    def unit(in_features: int, features: int, kernel: int, stride: int) -> nnx.List:
      modules: list[nnx.Module] = [
        layers.conv(in_features, features, kernel, stride=stride, use_bias=not norm, **args)
      ]
      if norm:
        modules.append(layers.batch_norm(features, dtype=dtype, rngs=rngs))
      return nnx.List(modules)

    features = scale_channels(32, width_mult)
    modules: list[nnx.Module] = [unit(in_channels, features, 3, 2)]
    for expansion, channels, repeats, stride in stages:
      channels = scale_channels(channels, width_mult)
      for index in range(repeats):
        modules.append(
          InvertedResidual(
            features,
            channels,
            expansion=expansion,
            stride=stride if index == 0 else 1,
            norm=norm,
            **args,
          )
        )
        features = channels
    last = scale_channels(last_channels, max(1.0, width_mult))
    modules.append(unit(features, last, 1, 1))
    self.features = nnx.List(modules)
    self.classifier = layers.linear(last, num_classes, dtype=dtype, rngs=rngs)
    self.padding = padding
    self.norm = norm
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, H, W, in_channels]."""
    layers.check_images(x, self.input_shape, exact=False)
    stem, *blocks, last = self.features
    x = layers.relu6(_chain(stem, x))
    for block in blocks:
      x = block(x)
    x = layers.relu6(_chain(last, x))
    return self.classifier(jnp.mean(x, axis=(1, 2)))


class DepthwiseSeparable(nnx.Module):
  """EfficientNet's block at expansion 1: depthwise, then a linear 1x1 (timm's names)."""

  def __init__(self, in_features, features, *, kernel, stride, padding, eps, dtype, rngs):
    args = {"padding": padding, "dtype": dtype, "rngs": rngs}
    norm = {"eps": eps, "dtype": dtype, "rngs": rngs}
    self.conv_dw = layers.conv(
      in_features, in_features, kernel, stride=stride, groups=in_features, **args
    )
    self.bn1 = layers.batch_norm(in_features, **norm)
    self.conv_pw = layers.conv(in_features, features, 1, **args)
    self.bn2 = layers.batch_norm(features, **norm)
    self.residual = stride == 1 and in_features == features

  def __call__(self, x: jax.Array) -> jax.Array:
    y = layers.relu6(self.bn1(self.conv_dw(x)))
    y = self.bn2(self.conv_pw(y))
    return x + y if self.residual else y


class MBConv(nnx.Module):
  """EfficientNet's inverted residual without squeeze-excite (timm's names)."""

  def __init__(
    self, in_features, features, *, expansion, kernel, stride, padding, eps, dtype, rngs
  ):
    hidden = in_features * expansion
    args = {"padding": padding, "dtype": dtype, "rngs": rngs}
    norm = {"eps": eps, "dtype": dtype, "rngs": rngs}
    self.conv_pw = layers.conv(in_features, hidden, 1, **args)
    self.bn1 = layers.batch_norm(hidden, **norm)
    self.conv_dw = layers.conv(hidden, hidden, kernel, stride=stride, groups=hidden, **args)
    self.bn2 = layers.batch_norm(hidden, **norm)
    self.conv_pwl = layers.conv(hidden, features, 1, **args)
    self.bn3 = layers.batch_norm(features, **norm)
    self.residual = stride == 1 and in_features == features

  def __call__(self, x: jax.Array) -> jax.Array:
    y = layers.relu6(self.bn1(self.conv_pw(x)))
    y = layers.relu6(self.bn2(self.conv_dw(y)))
    y = self.bn3(self.conv_pwl(y))
    return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
  """EfficientNet-Lite0 for images [B, H, W, in_channels] of any size.

  Args:
    stages: rows (expansion, channels, repeats, stride, kernel).
    width_mult: factor of all channels but those of the stem, rounded to multiples of 8.
    last_channels: channels of the 1x1 convolution before pooling.
    padding: 'torch' or 'tf_same'.
    eps: epsilon of the batch norms: 1e-5 for weights trained in torch, 1e-3 for TensorFlow's.
    num_classes: outputs of the linear head.
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
    stages: tuple[tuple[int, int, int, int, int], ...] = EFFICIENTNET_LITE0_STAGES,
    width_mult: float = 1.0,
    last_channels: int = 1280,
    padding: str = "torch",
    eps: float = 1e-5,
    num_classes: int = 1000,
    in_channels: int = 3,
    input_size: int = 224,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check(stages, 5, padding, width_mult)
    layers.check_positive(
      last_channels=last_channels,
      num_classes=num_classes,
      in_channels=in_channels,
      input_size=input_size,
    )
    conv = {"padding": padding, "dtype": dtype, "rngs": rngs}
    norm = {"eps": eps, "dtype": dtype, "rngs": rngs}

    features = 32  # The Lite networks never scale their stem.
    self.conv_stem = layers.conv(in_channels, features, 3, stride=2, **conv)
    self.bn1 = layers.batch_norm(features, **norm)
    groups = []
    for expansion, channels, repeats, stride, kernel in stages:
      channels = scale_channels(channels, width_mult)
      blocks: list[nnx.Module] = []
      for index in range(repeats):
        args = {"kernel": kernel, "stride": stride if index == 0 else 1, "eps": eps, **conv}
        if expansion == 1:
          blocks.append(DepthwiseSeparable(features, channels, **args))
        else:
          blocks.append(MBConv(features, channels, expansion=expansion, **args))
        features = channels
      groups.append(nnx.List(blocks))
    self.blocks = nnx.List(groups)
    self.conv_head = layers.conv(features, last_channels, 1, **conv)
    self.bn2 = layers.batch_norm(last_channels, **norm)
    self.classifier = layers.linear(last_channels, num_classes, dtype=dtype, rngs=rngs)
    self.padding = padding
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, H, W, in_channels]."""
    layers.check_images(x, self.input_shape, exact=False)
    x = layers.relu6(self.bn1(self.conv_stem(x)))
    for stage in self.blocks:
      for block in stage:
        x = block(x)
    x = layers.relu6(self.bn2(self.conv_head(x)))
    return self.classifier(jnp.mean(x, axis=(1, 2)))


def _chain(modules, x: jax.Array) -> jax.Array:
  for module in modules:
    x = module(x)
  return x


def _check(stages, columns: int, padding: str, width_mult: float) -> None:
  """Refuses impossible stages, paddings and width factors, by name."""
  layers.check_padding(padding)
  if not isinstance(width_mult, (int, float)) or not width_mult > 0:
    raise ValueError(f"width_mult={width_mult!r} is refused; accepted: a positive number")
  if not stages:
    raise ValueError("stages is empty; accepted: at least one row")
  for index, row in enumerate(stages):
    if len(row) != columns:
      raise ValueError(f"stages[{index}]={row!r} has {len(row)} numbers; accepted: {columns}")
    layers.check_positive(**{f"stages[{index}]": tuple(row)})
