"""Models on tokens, with blocks under `scan` and weights that layers share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax import models
from tests.graph import models_for_test

VOCABULARY, WIDTH, BLOCKS = 11, 4, 2
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 3)).astype(np.int32)


def attend(q, k, v):
  return jax.nn.softmax(q @ k.swapaxes(1, 2), axis=-1) @ v


class Block(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
    self.fc1 = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
    self.fc2 = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    x = x + attend(*jnp.split(self.qkv(self.norm(x)), 3, axis=-1))
    return x + self.fc2(nnx.relu(self.fc1(x)))


class Tied(nnx.Module):
  """Blocks under `nnx.scan`; the embedding is the head, too."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    make = nnx.vmap(Block, in_axes=0, out_axes=0)
    self.blocks = nnx.split_rngs(splits=BLOCKS)(make)(rngs)

  def __call__(self, ids):
    run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.embed.attend(run(self.embed(ids), self.blocks))[:, -1]


def tied_nnx():
  apply, params = models.functional(Tied(nnx.Rngs(0)))
  return apply, models_for_test.randomize(params)


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    h = nn.relu(nn.Dense(2 * WIDTH, name="fc1")(nn.LayerNorm(name="norm")(x)))
    return x + nn.Dense(WIDTH, name="fc2")(h), None


class LinenNet(nn.Module):
  """Blocks under `nn.scan`, computed anew in backward passes."""

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": BLOCKS}
    x, _ = nn.scan(nn.remat(LinenBlock), **options)(name="blocks")(x, None)
    return nn.Dense(5, name="head")(x.mean(axis=1))


def linen_remat():
  net = LinenNet()
  return net.apply, models_for_test.randomize(net.init(jax.random.key(0), IDS[:1]))


def tied_function():
  """Weights used twice, and a table that the first layer reads at once."""
  shapes = {"table": (VOCABULARY, WIDTH), "in": (WIDTH, 6), "twice": (6, 6), "out": (6, WIDTH)}
  params = models_for_test.randomize({k: jnp.zeros(s) for k, s in shapes.items()})

  def apply(p, ids):
    x = jax.nn.relu(p["table"][ids[:, 0]] @ p["in"])
    x = jax.nn.relu(jax.nn.relu(x @ p["twice"]) @ p["twice"])
    return (x @ p["out"]) @ p["table"].T

  return apply, params
