"""A block at three widths: mixing, distillation, gradients, and the model that becomes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.methods.ptmq import block as blocks
from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.methods.ptmq.method import boundaries, finished
from tests.methods import models_for_test, starts_for_test
from tests.methods.normed_for_test import compiled

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")

BITS = (4, 6, 8)
NAMES = starts_for_test.NAMES


@pytest.fixture(scope="module")
def made(compiled):
  """Grids of the layers to lower, nothing trained, and uniform models."""
  del compiled
  calibrated = starts_for_test.calibrated()
  network = calibrated.network
  kept = [layer.name for layer in network.layers if layer.name not in NAMES]
  uniform = {bits: calibrated.uniform(bits, keep8=kept) for bits in BITS}
  grids = {n: blocks.grid(network.layer(n), network.weights[n], uniform) for n in NAMES}
  return network, uniform, blocks.Widths(grids=grids, base=calibrated.base)


def start_of(network, widths, k, hard=False):
  v = {n: rounding.start(own.steps(network.layer(n), k)) for n, own in widths.grids.items()}
  if hard:
    v = jax.tree.map(lambda v: jnp.where(v >= 0, 100.0, -100.0), v)
  return {"v": v, "log_x": {n: jnp.zeros(3) for n in v}}


@pytest.mark.parametrize("k", [0, 2])
def test_nearest_rounding_is_the_uniform_model(made, k):
  network, uniform, widths = made
  trained = start_of(network, widths, k)
  model = finished(network, uniform[BITS[k]], widths.grids, trained, k)
  for name in NAMES:
    same = np.asarray(model[name].w) == np.asarray(uniform[BITS[k]][name].w)
    assert same.mean() > 0.99  # but for ties
    assert model[name].x_scale == uniform[BITS[k]][name].x_scale
  assert {name: q.bits for name, q in model.items() if name not in NAMES} == {
    "stem": 8,
    "depth": 8,
    "head": 8,
  }


@pytest.mark.parametrize(("weight", "activation"), [(0, 0), (2, 2)])
def test_made_up_roundings_compute_the_finished_model(made, weight, activation):
  network, uniform, widths = made
  trained = start_of(network, widths, 0, hard=True)
  trained["log_x"] = {n: jnp.full(3, 0.1) for n in NAMES}
  model = finished(network, uniform[BITS[weight]], widths.grids, trained, weight)
  x = models_for_test.made().images
  rule = widths.rule(trained, weight, activation)
  found = jax.jit(graph.with_rule(network.apply, rule))(network.params, x)
  expected = np.asarray(network.uniform(model, x))
  # Float roundings move single activations to the next code, and these what follows.
  apart = np.sort(np.abs(found - expected).max(axis=1))
  assert apart[0] < 1e-4 and apart[-1] < 0.1


def test_one_rounding_serves_all_widths(made):
  network, uniform, widths = made
  up = {n: jnp.full(own.w.shape, 100.0) for n, own in widths.grids.items()}
  trained = {"v": up, "log_x": {n: jnp.zeros(3) for n in NAMES}}
  for k, bits in enumerate(BITS):
    model = finished(network, uniform[bits], widths.grids, trained, k)
    for name, own in widths.grids.items():
      steps = np.floor(np.asarray(own.steps(network.layer(name), k))) + 1
      top = 2 ** (bits - 1) - 1
      np.testing.assert_array_equal(model[name].w, np.minimum(steps, top))


def test_gradients_reach_rounding_and_the_scales_in_use(made):
  network, _, widths = made
  trained = start_of(network, widths, 0)
  x = models_for_test.made().images

  def loss(trained, params, x):
    y = graph.with_rule(network.apply, widths.rule(trained, 0, 1))(params, x)
    return jnp.square(y - 1).mean()

  slope, real = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, network.params, x)
  for name in NAMES:
    assert float(jnp.abs(slope["v"][name]).max()) > 0
    assert (np.asarray(slope["log_x"][name]) != 0).tolist() == [False, True, False]
  # Weights are frozen.
  frozen = {n: float(jnp.abs(real[n]).max()) for n in (*NAMES, "stem", "depth", "head")}
  assert set(frozen.values()) == {0.0}


def trees(seed):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 5), (4, 2, 3)))


def test_mixing_all_or_nothing():
  key, real, blended = jax.random.key(0), trees(0), trees(1)
  jax.tree.map(np.testing.assert_array_equal, blocks.mix(key, real, blended, 0.0), blended)
  jax.tree.map(np.testing.assert_array_equal, blocks.mix(key, real, blended, 1.0), real)
  large = jnp.ones(10_000), jnp.zeros(10_000)
  assert float(blocks.mix(key, *large, 0.3).mean()) == pytest.approx(0.3, abs=0.02)


def test_blending_one_width_is_its_forward():
  outputs = [trees(seed) for seed in range(3)]
  for k in range(3):
    shares = np.eye(3)[k].tolist()
    jax.tree.map(np.testing.assert_array_equal, blocks.blend(outputs, shares), outputs[k])
  mean = blocks.blend(outputs, (1 / 3,) * 3)
  jax.tree.map(
    lambda m, *f: np.testing.assert_allclose(m, np.mean(f, axis=0), atol=1e-6), mean, *outputs
  )


def test_distillation():
  real, low, middle, high = (jnp.full((2, 3), v) for v in (0.0, 4.0, 2.0, 1.0))
  blended = blocks.blend((low, middle, high), (0.5, 0.25, 0.25))
  found = blocks.distillation(real, (low, middle, high), blended, (1.0, 10.0, 100.0))
  assert float(found) == pytest.approx(2.75**2 + 10 * 1 + 100 * 9)
  assert float(blocks.distillation(real, (real,) * 3, real, (1.0, 1.0, 1.0))) == 0


def test_blocks_are_residual_blocks():
  start = starts_for_test
  network = start.calibrated().network
  names = boundaries(network, models_for_test.made().images[:1]).names
  # Across `down` there are two activations.
  assert names == ("stem", "depth", "conv", "up", "head")
