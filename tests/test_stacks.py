"""Own models on tokens, with stacked blocks and tied weights, all the way to deployed ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.shared import reporting
from flexiq_jax import deployment, flexiq, models
from flexiq_jax.deployment import artifact
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings
from flexiq_jax.search import SearchSettings
from tests.graph import models_for_test

VOCABULARY, WIDTH, BLOCKS = 11, 4, 2
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 3)).astype(np.int32)
RATIOS = (0.0, 0.5, 1.0)


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


BLOCK_LAYERS = {"tied_nnx": ("qkv", "fc1", "fc2"), "linen_remat": ("fc1", "fc2")}
MODELS = {  # the model, its other layers, and which of them share weights
  "tied_nnx": (tied_nnx, ["embed"], {"embed": "embed/embedding"}),
  "linen_remat": (linen_remat, ["head"], {}),
  "tied_function": (
    tied_function,
    ["in", "twice", "twice:2", "out", "table"],
    {"twice": "twice:2", "twice:2": "twice", "table": "table"},
  ),
}


@functools.cache
def made(name):
  apply, params = MODELS[name][0]()
  network = Network(apply, params, IDS[:1])
  names = [layer.name for layer in network.layers[:-1]]  # the first one reads no raw input
  settings = LowSettings(group_size=2)
  return apply, params, flexiq.quantize(network, [IDS], names=names, settings=settings)


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_what_they_share(name):
  _, others, shared = MODELS[name]
  network = made(name)[2].network
  blocks = [f"blocks/{i}/{layer}" for i in range(BLOCKS) for layer in BLOCK_LAYERS.get(name, ())]
  assert [layer.name for layer in network.layers] == [*blocks, *others]
  assert network.shared == shared
  assert not network.skipped
  notes = [f"`{name}` shares weights with `{other}`." for name, other in shared.items()]
  assert reporting.layer_notes(network) == notes


@pytest.mark.parametrize("name", MODELS)
def test_deployed_logits_are_the_simulated_ones(name, tmp_path):
  apply, params, model = made(name)
  exact = np.asarray(apply(params, IDS))
  np.testing.assert_allclose(model.network.float(IDS), exact, rtol=1e-4, atol=1e-5)
  deployed, run = deployment.deploy(model, IDS[:1], levels=RATIOS), jax.jit(deployment.apply)
  folder = artifact.save(tmp_path / "artifact", deployed, name=name)
  loaded = artifact.load(folder, apply, params, IDS[:1])
  spread, errors = np.square(exact - exact.mean(axis=0)).mean(), []
  for ratio in RATIOS:
    logits = np.asarray(model(IDS, ratio))
    np.testing.assert_array_equal(run(deployed, IDS, deployed.level(ratio)), logits)
    np.testing.assert_array_equal(run(loaded, IDS, loaded.level(ratio)), logits)
    errors.append(np.square(logits - exact).mean() / spread)
  assert errors[0] < 0.02 and errors[0] < errors[-1]
  # What is looked up stays real; nothing else of the layers does.
  tables = {"tied_nnx": "embed/embedding:float", "tied_function": "table:float"}
  kept = [path for path in deployed.floats if "norm" not in path and "bias" not in path]
  assert kept == [tables.get(name, "params/embed/embedding")]


@pytest.mark.parametrize("name", ["tied_nnx"])
def test_default_search_runs_on_tokens(name):
  *_, model = made(name)
  settings = SearchSettings(levels=(0.5,), rounds=1, candidates=2)
  assert settings.method == "gram"
  found = flexiq.improve(model, IDS, settings)
  assert sorted(found.schedule.order) == sorted(model.schedule.order)
  exact = np.asarray(model(IDS, 0.0))
  distance = lambda m: np.square(np.asarray(m(IDS, 0.5)) - exact).sum()
  assert distance(found) <= distance(model)
