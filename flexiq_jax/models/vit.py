"""Vision transformers: ViT, DeiT, and a small one for CIFAR-10.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), section 3.1; Touvron et al.,
"Training data-efficient image transformers" (ICML 2021), for the tiny and small sizes. Names and
details are timm's: pre-norm blocks, a class token, learned position embeddings over class token and
patches, one fused qkv projection, the exact GELU, LayerNorm epsilon 1e-6, and a linear head on the
class token.

| symbol | meaning                                  | ViT-B/16 at 224 |
|--------|------------------------------------------|-----------------|
| N      | tokens, (input_size / patch_size)^2 + 1  | 197             |
| D      | width of a token                         | 768             |
| h      | attention heads, each D / h wide         | 12              |
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models import layers


class PatchEmbed(nnx.Module):
  """Cuts images into patches and projects each: [B, H, W, C] -> [B, H W / P^2, D]."""

  def __init__(self, in_channels, width, *, patch_size, dtype, rngs):
    self.proj = layers.patch_conv(in_channels, width, patch_size, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.proj(x)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
  """Multi-head self-attention with one fused projection for queries, keys and values."""

  def __init__(self, width, heads, *, dtype, rngs):
    self.qkv = layers.linear(width, 3 * width, init=layers.trunc_normal, dtype=dtype, rngs=rngs)
    self.proj = layers.linear(width, width, init=layers.trunc_normal, dtype=dtype, rngs=rngs)
    self.heads = heads

  def __call__(self, x: jax.Array) -> jax.Array:
    """Attends within each example: [B, N, D] -> [B, N, D]."""
    batch, tokens, width = x.shape
    head_width = width // self.heads
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, head_width)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * head_width**-0.5, key)
    y = jnp.einsum("bhqk,bkhd->bqhd", layers.softmax_float32(scores), value)
    return self.proj(y.reshape(batch, tokens, width))


class Block(nnx.Module):
  """One pre-norm encoder block: attention and MLP, each after a LayerNorm, with a residual."""

  def __init__(self, width, heads, hidden, *, dtype, rngs):
    args = {"dtype": dtype, "rngs": rngs}
    self.norm1 = layers.layer_norm(width, eps=1e-6, **args)
    self.attn = Attention(width, heads, **args)
    self.norm2 = layers.layer_norm(width, eps=1e-6, **args)
    self.mlp = layers.Mlp(width, hidden, **args)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
  """A vision transformer for images [B, input_size, input_size, in_channels].

  Args:
    width: width D of a token.
    depth: number of blocks.
    heads: attention heads; must divide `width`.
    mlp_ratio: hidden width of the MLP over `width`.
    patch_size: side of a patch in pixels; must divide `input_size`.
    input_size: side of the images in pixels, fixed by the position embeddings.
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
    depth: int,
    heads: int,
    mlp_ratio: int = 4,
    patch_size: int = 16,
    input_size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    dtype: layers.Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_positive(
      width=width,
      depth=depth,
      heads=heads,
      mlp_ratio=mlp_ratio,
      patch_size=patch_size,
      input_size=input_size,
      num_classes=num_classes,
      in_channels=in_channels,
    )
    if width % heads:
      raise ValueError(f"heads={heads} is refused; accepted: divisors of width={width}")
    if input_size % patch_size:
      raise ValueError(
        f"input_size={input_size} is refused; accepted: multiples of patch_size={patch_size}"
      )
    args = {"dtype": dtype, "rngs": rngs}
    tokens = (input_size // patch_size) ** 2 + 1
    self.patch_embed = PatchEmbed(in_channels, width, patch_size=patch_size, **args)
    self.cls_token = nnx.Param(layers.trunc_normal(rngs.params(), (1, 1, width)))
    self.pos_embed = nnx.Param(layers.trunc_normal(rngs.params(), (1, tokens, width)))
    self.blocks = nnx.List([Block(width, heads, mlp_ratio * width, **args) for _ in range(depth)])
    self.norm = layers.layer_norm(width, eps=1e-6, **args)
    self.head = layers.linear(width, num_classes, init=layers.trunc_normal, **args)
    self.dtype = dtype
    self.input_shape = (input_size, input_size, in_channels)
    self.num_classes = num_classes

  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes logits [B, num_classes] of images `x` [B, input_size, input_size, in_channels]."""
    layers.check_images(x, self.input_shape, exact=True)
    x = self.patch_embed(x)
    token = self.cls_token[...].astype(self.dtype)
    token = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([token, x], axis=1) + self.pos_embed[...].astype(self.dtype)
    for block in self.blocks:
      x = block(x)
    # Only the class token is classified, and LayerNorm works token by token, so norm it alone.
    return self.head(self.norm(x[:, 0]))
