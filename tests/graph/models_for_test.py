"""Small models in every dialect the graph must understand, with random parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def randomize(params, seed=0):
  """Random values for every leaf, variances positive, so that nothing is accidentally zero."""
  flat, tree = jax.tree_util.tree_flatten_with_path(params)
  rng = np.random.default_rng(seed)

  def leaf(keys, a):
    value = rng.normal(size=a.shape) * 0.5
    if "var" in jax.tree_util.keystr(keys):
      value = np.abs(value) + 0.5
    return jnp.asarray(value, a.dtype)

  return jax.tree.unflatten(tree, [leaf(k, a) for k, a in flat])


class NnxNet(nnx.Module):
  """Convolution + batch norm + ReLU, grouped, depthwise, DenseGeneral-like head."""

  def __init__(self, rngs, dtype=jnp.float32):
    self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, use_bias=False, dtype=dtype, rngs=rngs)
    self.bn1 = nnx.BatchNorm(8, use_running_average=True, dtype=dtype, rngs=rngs)
    self.depthwise = nnx.Conv(
      8, 8, (3, 3), feature_group_count=8, kernel_dilation=2, dtype=dtype, rngs=rngs
    )
    self.bn2 = nnx.BatchNorm(8, use_running_average=True, dtype=dtype, rngs=rngs)
    self.grouped = nnx.Conv(8, 12, (1, 1), feature_group_count=2, dtype=dtype, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(
      3, 12, decode=False, deterministic=True, dtype=dtype, rngs=rngs
    )
    self.head = nnx.Linear(12, 5, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.bn1(self.conv1(x)))
    x = x + nnx.relu(self.bn2(self.depthwise(x)))
    x = nnx.gelu(self.grouped(x))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = x + self.attn(x)
    return self.head(x.mean(axis=1))


def nnx_model(dtype=jnp.float32):
  graphdef, state = nnx.split(NnxNet(nnx.Rngs(0), dtype), ...)
  state = randomize(nnx.filter_state(state, nnx.Any(nnx.Param, nnx.BatchStat)))
  rest = nnx.filter_state(
    nnx.state(nnx.merge(graphdef, nnx.state(NnxNet(nnx.Rngs(0), dtype)))),
    nnx.Not(nnx.Any(nnx.Param, nnx.BatchStat)),
  )
  return (lambda params, x: nnx.merge(graphdef, params, rest)(x)), state


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="conv1")(x)
    x = nn.BatchNorm(use_running_average=True, name="bn1")(x)
    x = nn.relu(x)
    x = nn.remat(nn.Conv)(8, (3, 3), feature_group_count=8, name="depthwise")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = nn.DenseGeneral((3, 4), name="split")(x)
    x = nn.DenseGeneral(6, axis=(-2, -1), name="merge")(jax.nn.silu(x))
    return nn.Dense(5, name="head")(x.mean(axis=1))


def linen_model():
  net = LinenNet()
  variables = randomize(net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
  return net.apply, variables


def plain_model():
  rng = np.random.default_rng(0)
  params = {
    "stem": jnp.asarray(rng.normal(size=(3, 3, 3, 8)) * 0.3, jnp.float32),
    "heads": jnp.asarray(rng.normal(size=(2, 4, 3)) * 0.3, jnp.float32),
    "out": {"w": jnp.asarray(rng.normal(size=(5, 6)) * 0.3, jnp.float32), "b": jnp.ones(5)},
  }

  @jax.jit
  def body(params, x):
    x = jax.lax.conv_general_dilated(
      x, params["stem"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x).mean(axis=(1, 2)).reshape(x.shape[0], 2, 4)
    x = jnp.einsum("bhd,hde->bhe", x, params["heads"])  # heads share a dimension with x
    return x.reshape(x.shape[0], 6)

  def apply(params, x):
    return jnp.einsum("of,bf->bo", params["out"]["w"], body(params, x)) + params["out"]["b"][None]

  return apply, params


MODELS = {"nnx": nnx_model, "linen": linen_model, "plain": plain_model}


def image(batch=2, size=8, seed=1, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), (batch, size, size, 3), dtype)
