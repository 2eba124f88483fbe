"""Swin transformers: attention within shifted windows, and patch merging between stages.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021),
section 3. Names are timm's (`layers/1/blocks/0/attn/qkv/kernel`); the classifier is `head`.
LayerNorm epsilon 1e-5, exact GELU.

| symbol | meaning                                                | Swin-T at 224 |
|--------|--------------------------------------------------------|---------------|
| H, W   | feature map of a stage; halves from stage to stage     | 56, 28, 14, 7 |
| M      | side of a window; a window holds M^2 tokens            | 7             |
| D      | width of a token; doubles from stage to stage          | 96 ... 768    |

Every second block shifts its windows by M // 2 by rolling the map (section 3.2, "efficient batch
computation"); a mask keeps tokens apart that were no neighbours before the roll. A map of one
window alone is not shifted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax.models import layers

EPS = 1e-5
# Added to scores across a seam; exp of it is zero, and it is finite in every dtype.
MASKED = -100.0


@functools.lru_cache
def relative_position_index(window: int) -> np.ndarray:
  """Row of the bias table for each pair of tokens in a window.

  Args:
    window: side M of the window.

  Returns:
    int32 [M^2, M^2], values in 0 .. (2 M - 1)^2 - 1, as in the authors' code: row offset times
    (2 M - 1) plus column offset, both counted from -(M - 1).
  """
  rows, columns = np.divmod(np.arange(window * window), window)
  row_offset = rows[:, None] - rows[None, :] + window - 1
  column_offset = columns[:, None] - columns[None, :] + window - 1
  return (row_offset * (2 * window - 1) + column_offset).astype(np.int32)


@functools.lru_cache
def shift_mask(size: int, window: int, shift: int) -> np.ndarray:
  """What to add to attention scores so that rolled windows do not attend across the seam.

  Args:
    size: side of the feature map.
    window: side M of the windows; divides `size`.
    shift: how far the map was rolled.

  Returns:
    float32 [(size / M)^2, M^2, M^2] of 0 and MASKED.
  """
  # After the roll, the last window of each row holds two strips that came from opposite borders.
  position = np.arange(size)
  strip = (position >= size - window).astype(np.int32) + (position >= size - shift)
  region = 3 * strip[:, None] + strip[None, :]
  count = size // window
  region = region.reshape(count, window, count, window).transpose(0, 2, 1, 3)
  region = region.reshape(count * count, window * window)
  return np.where(region[:, :, None] == region[:, None, :], 0.0, MASKED).astype(np.float32)


class WindowAttention(nnx.Module):
  """Multi-head attention within windows, with a learned bias for each relative position."""

  def __init__(self, width, heads, window, *, dtype, rngs):
    init = layers.trunc_normal
    self.relative_position_bias_table = nnx.Param(
      init(rngs.params(), ((2 * window - 1) ** 2, heads))
    )
    self.qkv = layers.linear(width, 3 * width, init=init, dtype=dtype, rngs=rngs)
    self.proj = layers.linear(width, width, init=init, dtype=dtype, rngs=rngs)
    self.heads = heads
    self.window = window

  def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
    """Attends within each window.

    Args:
      x: [B, windows, T, D], T = M^2 tokens of a window.
      mask: [windows, T, T] to add to the scores, or None.

    Returns:
      [B, windows, T, D].
    """
    batch, windows, tokens, width = x.shape
    head_width = width // self.heads
    qkv = self.qkv(x).reshape(batch, windows, tokens, 3, self.heads, head_width)
    query, key, value = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    scores = jnp.einsum("bwqhd,bwkhd->bwhqk", query * head_width**-0.5, key)
    bias = self.relative_position_bias_table[...][relative_position_index(self.window)]
    bias = jnp.transpose(bias, (2, 0, 1))[None, None]  # [1, 1, heads, T, T]
    if mask is not None:
      bias = bias + mask[None, :, None]
    scores = layers.softmax_float32(scores + bias.astype(scores.dtype))
    y = jnp.einsum("bwhqk,bwkhd->bwqhd", scores, value)
    return self.proj(y.reshape(batch, windows, tokens, width))


class SwinBlock(nnx.Module):
  """A pre-norm block on a map [B, size, size, D]; shifts its windows if `shift` is not zero."""

  def __init__(self, width, heads, *, size, window, shift, mlp_ratio, dtype, rngs):
    args = {"dtype": dtype, "rngs": rngs}
    self.norm1 = layers.layer_norm(width, eps=EPS, **args)
    self.attn = WindowAttention(width, heads, window, **args)
    self.norm2 = layers.layer_norm(width, eps=EPS, **args)
    self.mlp = layers.Mlp(width, mlp_ratio * width, **args)
    self.size = size
    self.window = window
    self.shift = shift

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self._attend(self.norm1(x))
    return x + self.mlp(self.norm2(x))

  def _attend(self, x: jax.Array) -> jax.Array:
    batch, size, _, width = x.shape
    window, count = self.window, size // self.window
    mask = shift_mask(self.size, window, self.shift) if self.shift else None
    if self.shift:
      x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
    x = x.reshape(batch, count, window, count, window, width).transpose(0, 1, 3, 2, 4, 5)
    x = self.attn(x.reshape(batch, count * count, window * window, width), mask)
    x = x.reshape(batch, count, count, window, window, width).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, size, size, width)
    if self.shift:
      x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
    return x


class PatchMerging(nnx.Module):
  """Joins each 2x2 patch of tokens: [B, H, W, D] -> [B, H / 2, W / 2, 2 D]."""

  def __init__(self, width, *, dtype, rngs):
    self.norm = layers.layer_norm(4 * width, eps=EPS, dtype=dtype, rngs=rngs)
    self.reduction = layers.linear(
      4 * width, 2 * width, use_bias=False, init=layers.trunc_normal, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    # Column offset before row offset: the order in which the pretrained weights expect the patch.
    x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
    return self.reduction(self.norm(x))


class SwinStage(nnx.Module):
  """Patch merging (except in the first stage), then blocks that alternate plain and shifted."""

  def __init__(self, width, depth, heads, *, size, window, merge, mlp_ratio, dtype, rngs):
    args = {"dtype": dtype, "rngs": rngs}
    self.downsample = PatchMerging(width // 2, **args) if merge else None
    window = min(window, size)
    shift = window // 2 if size > window else 0
    self.blocks = nnx.List(
      [
        SwinBlock(
          width,
          heads,
          size=size,
          window=window,
          shift=shift * (index % 2),
          mlp_ratio=mlp_ratio,
          **args,
        )
        for index in range(depth)
      ]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.downsample is not None:
      x = self.downsample(x)
    for block in self.blocks:
      x = block(x)
    return x


class SwinPatchEmbed(nnx.Module):
  """Projects non-overlapping patches and norms them: [B, H, W, C] -> [B, H / P, W / P, D]."""

  def __init__(self, in_channels, width, *, patch_size, dtype, rngs):
    self.proj = layers.patch_conv(in_channels, width, patch_size, dtype=dtype, rngs=rngs)
    self.norm = layers.layer_norm(width, eps=EPS, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.norm(self.proj(x))


class SwinTransformer(nnx.Module):
  """A Swin transformer for images [B, input_size, input_size, in_channels].

  Args:
    width: token width of the first stage; doubles from stage to stage.
    depths: number of blocks in each stage.
    heads: attention heads of each stage; each must divide that stage's width.
    window: side of the windows; a smaller map is one window.
    mlp_ratio: hidden width of the MLP over the token width.
    patch_size: side of a patch in pixels.
    input_size: side of the images in pixels, fixed by windows and masks.
    num_classes: outputs of the linear head.
    in_channels: channels of the images.
    dtype: compute dtype; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: an argument is outside what is accepted; the message names it.
  """

  def __init__(
    self,
    *,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int = 7,
    mlp_ratio: int = 4,
    patch_size: int = 4,
    input_size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_positive(
      width=width,
      depths=depths,
      heads=heads,
      window=window,
      mlp_ratio=mlp_ratio,
      patch_size=patch_size,
      input_size=input_size,
      num_classes=num_classes,
      in_channels=in_channels,
    )
    if len(depths) != len(heads):
      raise ValueError(f"heads={heads!r} is refused; accepted: one number for each of {depths=!r}")
    if input_size % patch_size:
      raise ValueError(
        f"input_size={input_size} is refused; accepted: multiples of patch_size={patch_size}"
      )
    args = {"dtype": dtype, "rngs": rngs}
    size = input_size // patch_size
    self.patch_embed = SwinPatchEmbed(in_channels, width, patch_size=patch_size, **args)
    stages = []
    for index, (depth, stage_heads) in enumerate(zip(depths, heads, strict=True)):
      if index > 0:
        if size % 2:
          raise ValueError(
            f"input_size={input_size} is refused: stage {index} would merge a map of odd size "
            f"{size}; accepted: multiples of {patch_size << (len(depths) - 1)}"
          )
        size, width = size // 2, 2 * width
      if width % stage_heads:
        raise ValueError(
          f"heads[{index}]={stage_heads} is refused; accepted: divisors of that stage's "
          f"width {width}"
        )
      if size % min(window, size):
        raise ValueError(
          f"window={window} is refused; accepted: divisors of {size}, the side of the map of "
          f"stage {index} (at input_size={input_size})"
        )
      stages.append(
        SwinStage(
          width,
          depth,
          stage_heads,
          size=size,
          window=window,
          merge=index > 0,
          mlp_ratio=mlp_ratio,
          **args,
        )
      )
    self.layers = nnx.List(stages)
    self.norm = layers.layer_norm(width, eps=EPS, **args)
    self.head = layers.linear(width, num_classes, init=layers.trunc_normal, **args)
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, input_size, input_size, in_channels]."""
    layers.check_images(x, self.input_shape, exact=True)
    x = self.patch_embed(x)
    for stage in self.layers:
      x = stage(x)
    return self.head(jnp.mean(self.norm(x), axis=(1, 2)))
