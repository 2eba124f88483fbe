"""Building blocks that the vision models share: convolution, normalisation, linear layers, checks.

All of them are plain Flax NNX modules with the initialisers and constants of the PyTorch models
that the pretrained weights come from. A convolution or a linear layer is one contraction of an
activation with one parameter, which is all that the quantization passes ask of a model.

| setting  | torch                   | here                                               |
|----------|-------------------------|----------------------------------------------------|
| layout   | NCHW, weights OIHW      | NHWC, weights HWIO                                 |
| padding  | `padding=(k - 1) // 2`  | `'torch'`: the same; `'tf_same'`: XLA's `'SAME'`   |
| momentum | 0.1 (of the new value)  | 0.9 (of the old value)                             |

At stride 2 and even sizes `'tf_same'` pads more on the bottom and right, as TensorFlow does, where
torch pads both sides alike: weights trained with the one lose accuracy with the other, although the
shapes agree.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

PADDINGS = ("torch", "tf_same")
_XLA = {"tf_same": "SAME", "valid": "VALID"}
Dtype = Any

# He et al., "Delving Deep into Rectifiers" (ICCV 2015), fan-out mode as in torchvision's CNNs.
_he_normal = initializers.variance_scaling(2.0, "fan_out", "normal")
# Keeps the logits of an untrained CNN of order one; torch's default for nn.Linear has the same
# scale.
_linear_uniform = initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
trunc_normal = initializers.truncated_normal(stddev=0.02)


def relu6(x: jax.Array) -> jax.Array:
  """min(max(x, 0), 6), elementwise."""
  return jax.nn.relu6(x)


def conv(
  in_features: int,
  out_features: int,
  kernel: int,
  *,
  stride: int = 1,
  padding: str = "torch",
  groups: int = 1,
  use_bias: bool = False,
  dtype: Dtype,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A square 2-D convolution, NHWC, without bias unless asked for.

  Args:
    in_features: input channels.
    out_features: output channels.
    kernel: height and width of the window.
    stride: step in both directions.
    padding: 'torch' (symmetric, (kernel - 1) // 2), 'tf_same' (asymmetric at stride 2), or 'valid'
      (none).
    groups: feature groups; `in_features` of them make the convolution depthwise.
    use_bias: whether to add a bias, as models with folded batch norm do.
    dtype: compute dtype; the parameters stay float32.
    rngs: source of the initial weights.

  Returns:
    The module; its kernel is [kernel, kernel, in_features / groups, out_features].
  """
  same = (kernel - 1) // 2
  return nnx.Conv(
    in_features,
    out_features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=_XLA.get(padding, ((same, same), (same, same))),
    feature_group_count=groups,
    use_bias=use_bias,
    kernel_init=_he_normal,
    dtype=dtype,
    rngs=rngs,
  )


def patch_conv(
  in_channels: int, width: int, patch_size: int, *, dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Conv:
  """The projection of non-overlapping patches: [B, H, W, C] -> [B, H / P, W / P, width]."""
  return nnx.Conv(
    in_channels,
    width,
    (patch_size, patch_size),
    strides=(patch_size, patch_size),
    padding="VALID",
    kernel_init=trunc_normal,
    dtype=dtype,
    rngs=rngs,
  )


def linear(
  in_features: int,
  out_features: int,
  *,
  use_bias: bool = True,
  init: initializers.Initializer = _linear_uniform,
  dtype: Dtype,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """A linear layer over the last axis; kernel [in_features, out_features]."""
  return nnx.Linear(
    in_features, out_features, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs
  )


def batch_norm(features: int, *, eps: float = 1e-5, dtype: Dtype, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """Batch normalisation over all axes but the last; statistics are float32 whatever `dtype` is."""
  return nnx.BatchNorm(
    features,
    momentum=0.9,
    epsilon=eps,
    dtype=dtype,
    promote_dtype=_in_float32,
    # The one-pass variance E[x^2] - E[x]^2 cancels badly where |mean| >> std.
    use_fast_variance=False,
    rngs=rngs,
  )


def layer_norm(features: int, *, eps: float, dtype: Dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Layer normalisation over the last axis, computed in float32, returned in `dtype`."""
  return nnx.LayerNorm(
    features,
    epsilon=eps,
    dtype=dtype,
    promote_dtype=_in_float32,
    use_fast_variance=False,
    rngs=rngs,
  )


def max_pool_ceil(x: jax.Array) -> jax.Array:
  """Max over 3x3 windows at stride 2 without padding, sizes rounded up (torch's `ceil_mode`)."""
  missing = [max(3 - size, (size - 3) % 2) for size in x.shape[1:3]]
  return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=[(0, more) for more in missing])


def average_pool(x: jax.Array, size: int) -> jax.Array:
  """Mean over windows that make a map of `size` x `size` (torch's `AdaptiveAvgPool2d`).

  Args:
    x: [B, H, W, C]. Where a size is no multiple, windows overlap by one.
    size: height and width of the result.

  Returns:
    [B, size, size, C].
  """
  for axis in (1, 2):
    length = x.shape[axis]
    if length != size:
      bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
      windows = [jax.lax.slice_in_dim(x, *bound, axis=axis) for bound in bounds]
      means = [jnp.mean(window, axis=axis, keepdims=True) for window in windows]
      x = jnp.concatenate(means, axis=axis)
  return x


class Mlp(nnx.Module):
  """Two linear layers with the exact (erf) GELU between them, as in every vision transformer."""

  def __init__(self, width: int, hidden: int, *, dtype: Dtype, rngs: nnx.Rngs):
    self.fc1 = linear(width, hidden, init=trunc_normal, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, width, init=trunc_normal, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def softmax_float32(scores: jax.Array) -> jax.Array:
  """Softmax over the last axis in float32, returned in the dtype of `scores`."""
  return jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(scores.dtype)


def check_padding(padding: str) -> None:
  """Refuses a padding scheme that does not exist.

  Raises:
    ValueError: `padding` is neither 'torch' nor 'tf_same'.
  """
  if padding not in PADDINGS:
    raise ValueError(f"padding={padding!r} is unknown; accepted: {', '.join(map(repr, PADDINGS))}")


def check_positive(**values: Any) -> None:
  """Refuses sizes that are no positive integers, or no sequences of such.

  Raises:
    ValueError: a value is zero, negative, a bool, empty or no number; the message names it.
  """
  for name, value in values.items():
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not items or not all(type(item) is int and item > 0 for item in items):
      raise ValueError(f"{name}={value!r} is refused; accepted: positive integers")


def check_images(x: jax.Array, input_shape: tuple[int, int, int], *, exact: bool) -> None:
  """Refuses a batch that the model cannot take, before a convolution fails with a riddle.

  Args:
    x: the batch.
    input_shape: (height, width, channels) that the model was built for.
    exact: whether height and width must match too (transformers with position parameters).

  Raises:
    ValueError: `x` is not [B, H, W, C] with the expected sizes.
  """
  height, width, channels = input_shape
  wanted = f"[B, {height}, {width}, {channels}]" if exact else f"[B, H, W, {channels}]"
  sizes_differ = x.ndim != 4 or x.shape[-1] != channels
  if sizes_differ or (exact and x.shape[1:3] != (height, width)):
    raise ValueError(f"x has shape {list(x.shape)}; this model takes images {wanted} (NHWC)")


def _in_float32(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
  """Promotes what a normalisation computes with to float32: bfloat16 never holds statistics."""
  del dtype, inexact  # The result is cast to it by the module; the arithmetic is not.
  return tuple(None if a is None else jnp.asarray(a, jnp.float32) for a in args)
