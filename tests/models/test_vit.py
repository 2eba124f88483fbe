"""Vision transformer: attention by hand, and refused arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax.models.vit import Attention, PatchEmbed, VisionTransformer


def test_attention_equals_a_loop_over_heads():
  batch, tokens, width, heads = 2, 5, 12, 3
  module = Attention(width, heads, dtype=jnp.float32, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, tokens, width))
  kernel, bias = rng.normal(size=(width, 3 * width)), rng.normal(size=3 * width)
  module.qkv.kernel[...], module.qkv.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
  query, key, value = np.split(x @ kernel + bias, 3, axis=-1)
  merged = np.zeros((batch, tokens, width))
  for example in range(batch):
    for head in range(heads):
      part = np.s_[example, :, head * 4 : (head + 1) * 4]
      scores = np.exp(query[part] @ key[part].T / np.sqrt(4))
      merged[part] = scores / scores.sum(1, keepdims=True) @ value[part]
  expected = merged @ np.asarray(module.proj.kernel[...], np.float64)
  np.testing.assert_allclose(module(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_numbered_row_by_row():
  module = PatchEmbed(1, 1, patch_size=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
  module.proj.kernel[...] = jnp.full((2, 2, 1, 1), 0.25)
  image = jnp.kron(jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 2)))[None, :, :, None]
  np.testing.assert_allclose(module(image)[0, :, 0], np.arange(6))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"heads": 3}, r"heads=3 is refused; accepted: divisors of width=8"),
    ({"input_size": 30}, r"input_size=30 is refused; accepted: multiples of patch_size=16"),
    ({"depth": 0}, r"depth=0 is refused"),
    ({"mlp_ratio": True}, r"mlp_ratio=True is refused"),
  ],
)
def test_refused_arguments(arguments, message):
  options = {"width": 8, "depth": 1, "heads": 2, "input_size": 32, "rngs": nnx.Rngs(0)}
  with pytest.raises(ValueError, match=message):
    VisionTransformer(**{**options, **arguments})


def test_images_of_another_size_are_refused():
  build = functools.partial(VisionTransformer, width=8, depth=1, heads=2, input_size=32)
  with pytest.raises(ValueError, match=r"x has shape \[1, 48, 48, 3\].*\[B, 32, 32, 3\] \(NHWC\)"):
    jax.eval_shape(lambda: build(rngs=nnx.Rngs(0))(jnp.zeros((1, 48, 48, 3))))
