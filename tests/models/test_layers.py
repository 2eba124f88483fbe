"""Shared building blocks: precision of the norms, and the checks of arguments and images."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax.models import layers


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_norms_compute_in_float32_when_the_model_is_bfloat16(kind):
  """The result is the exact one rounded once; bfloat16 arithmetic would be off by several units."""
  rng = np.random.default_rng(0)
  x = (3 + rng.normal(size=(16, 8))).astype(jnp.bfloat16)
  scale, bias = rng.normal(size=8), rng.normal(size=8)
  if kind == "batch":
    norm = layers.batch_norm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = jnp.full(8, 3.0117), jnp.full(8, 1.0213)
    norm.eval()
    mean, var, eps = 3.0117, 1.0213, 1e-5
  else:
    norm = layers.layer_norm(8, eps=1e-6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = x.astype(np.float64)
    mean, var, eps = exact.mean(-1, keepdims=True), exact.var(-1, keepdims=True), 1e-6
  norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
  expected = (x.astype(np.float64) - mean) / np.sqrt(var + eps) * scale + bias
  y = norm(jnp.asarray(x))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_layer_norm_survives_a_mean_far_above_the_deviation():
  x = (1000 + np.random.default_rng(0).normal(size=(4, 64))).astype(np.float32)
  norm = layers.layer_norm(64, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
  exact = x.astype(np.float64)
  expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-3)


def test_batch_norm_momentum_is_torch_s():
  norm = layers.batch_norm(1, dtype=jnp.float32, rngs=nnx.Rngs(0))
  norm.train()
  norm(jnp.asarray([[1.0], [5.0]]))
  np.testing.assert_allclose(norm.mean[...], [0.1 * 3])
  np.testing.assert_allclose(norm.var[...], [0.9 + 0.1 * 4], rtol=1e-6)


@pytest.mark.parametrize("size", range(2, 9))
def test_max_pool_rounds_sizes_up(size):
  """Every start of a window that lies inside counts, as in torch's `ceil_mode`."""
  x = -1 - np.random.default_rng(size).random((1, size, 7, 2), np.float32)
  starts = lambda length: range(0, max(length - 2, 0) + 1, 2)
  wanted = [
    [x[:, i : i + 3, j : j + 3].max(axis=(1, 2)) for j in starts(7)]
    for i in starts(size)
    if i + 2 <= size
  ]
  found = np.asarray(layers.max_pool_ceil(jnp.asarray(x)))
  assert found.shape[1] == -(-(size - 3) // 2) + 1
  np.testing.assert_array_equal(found, np.moveaxis(np.asarray(wanted), 2, 0))


@pytest.mark.parametrize(("size", "pooled"), [(7, 7), (14, 7), (8, 3), (2, 3)])
def test_average_pool_has_torch_s_windows(size, pooled):
  x = np.random.default_rng(size).random((2, size, 6, 1), np.float32)
  window = lambda i, length: slice(i * length // pooled, -(-(i + 1) * length // pooled))
  wanted = [
    [x[:, window(i, size), window(j, 6)].mean(axis=(1, 2)) for j in range(pooled)]
    for i in range(pooled)
  ]
  found = layers.average_pool(jnp.asarray(x), pooled)
  np.testing.assert_allclose(found, np.moveaxis(np.asarray(wanted), 2, 0), rtol=1e-6)


def test_depthwise_convolution_keeps_channels_apart():
  conv = layers.conv(4, 4, 3, groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
  assert conv.kernel[...].shape == (3, 3, 1, 4) and conv.bias is None
  x = np.zeros((1, 5, 5, 4), np.float32)
  x[0, 2, 2, 1] = 1
  y = np.asarray(conv(x))
  assert y[..., 1].any() and not y[..., [0, 2, 3]].any()


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, (), (2, 0), [1, "x"], "33"])
def test_sizes_that_are_refused(value):
  with pytest.raises(ValueError, match=r"^depth=.* is refused; accepted: positive integers$"):
    layers.check_positive(width=3, depth=value)


@pytest.mark.parametrize("value", [1, (1, 2), [3]])
def test_sizes_that_are_accepted(value):
  layers.check_positive(depth=value)


def test_images_are_checked_for_rank_channels_and_size():
  shape = (8, 6, 3)
  layers.check_images(jnp.zeros((2, 8, 6, 3)), shape, exact=True)
  layers.check_images(jnp.zeros((2, 5, 5, 3)), shape, exact=False)
  for wrong, exact in (((8, 6, 3), False), ((2, 8, 6, 1), False), ((2, 6, 8, 3), True)):
    with pytest.raises(ValueError, match=r"x has shape .*; this model takes images \[B, "):
      layers.check_images(jnp.zeros(wrong), shape, exact=exact)
