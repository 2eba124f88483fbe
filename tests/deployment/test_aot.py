"""Whole deployed models compile for TPUs; no TPU is needed for that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import deployment, flexiq, models
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.network import Network
from flexiq_jax.quant.grouping import LowSettings
from tests import targets_for_test as targets
from tests.deployment.deployed_for_test import WIDE, made

pytestmark = pytest.mark.aot(legality_alone=True)
CHIPS = ("v5e", "v5p", "v6e", "v7x")
CASES = [c if c == "v5e" else pytest.param(c, marks=pytest.mark.slow) for c in CHIPS]
BATCH = 8


@pytest.fixture(scope="module")
def deit():
  """DeiT-S: the arrays of one real block stand for those of all twelve."""
  settings = LowSettings(group_size=128, shift_block=128, whole_heads=True)
  apply, params = models.functional(models.create("deit_s", seed=0, depth=1))
  x = np.zeros((1, 224, 224, 3), np.float32)
  network = Network(apply, params, x)
  names = [layer.name for layer in network.layers if layer.name.startswith("blocks")]
  own = flexiq.quantize(network, [x + 0.5], names=names, settings=settings)
  one = deployment.deploy(own, x, granule=128)
  name = lambda n, i: n.replace("blocks/0", f"blocks/{i}")
  repeated = lambda d: {name(n, i): v for n, v in d.items() for i in range(12)}
  whole = nnx.eval_shape(lambda: models.create("deit_s"))
  folded, shapes = deployment.fold_shapes(*models.functional(whole), x)
  layers = {
    n: d.replace(feeds=name(d.feeds, n.split("/")[1])) if isinstance(d, Mixed) else d
    for n, d in repeated(one.layers).items()
  }
  low = {n for n, d in layers.items() if isinstance(d, Mixed)}
  wiring = deployment.wire(folded, shapes, x, low)
  return deployment.Deployed(layers, repeated(one.floats), one.levels, wiring)


def text_of(deployed, shape, chip):
  """What the compiler made of a deployed model for a batch."""
  target = targets.get(chip)
  x, ratio = (target.placed(jax.ShapeDtypeStruct(s, jnp.float32)) for s in (shape, ()))

  @jax.jit
  def run(deployed, x, ratio):
    level = deployed.level(ratio)
    return deployment.apply(deployed, x, level, platform="tpu", kind=target.kind)

  return run.lower(target.placed(deployed), x, ratio).compile().as_text()


@pytest.mark.parametrize("chip", CASES)
def test_whole_model_compiles(deit, chip):
  text = text_of(deit, (BATCH, 224, 224, 3), chip)
  assert all(deit.layers[f"blocks/{i}/attn/proj"].order is None for i in range(12))
  # Four products in each block; operands of the three that no product feeds are prepared.
  assert text.count('custom_call_target="tpu_custom_call"') == 12 * (4 + 3)


def test_a_model_whose_windows_slide_compiles():
  small = made(WIDE, settings=LowSettings(group_size=32, shift_block=64))
  deployed = deployment.deploy(small.model, small.x[:1], granule=128)
  text = text_of(deployed, (BATCH, *small.x.shape[1:]), "v5e")
  assert text.count('custom_call_target="tpu_custom_call"') == 2
