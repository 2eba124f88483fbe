"""Own models on tokens, with stacked blocks and tied weights, all the way to deployed ones."""

import functools

import jax
import numpy as np
import pytest

from experiments.shared import reporting
from flexiq_jax import deployment, flexiq
from flexiq_jax.deployment import artifact
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings
from tests.stacks_for_test import BLOCKS, IDS, linen_remat, tied_function, tied_nnx

RATIOS = (0.0, 0.5, 1.0)

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
