"""Batch norm on a folded network is that of the module in training, and of the float model else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import graph, models
from flexiq_jax.methods import batch_norm
from flexiq_jax.methods.batch_norm import Affine, Moments
from flexiq_jax.methods.robustquant import folded, initial
from flexiq_jax.network import Network
from flexiq_jax.quant import rules
from tests.graph import models_for_test
from tests.methods import models_for_test as models_for_methods
from tests.methods import normed_for_test as normed
from tests.methods.normed_for_test import compiled
from tests.search import networks_for_test as networks

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")


def test_layers_with_batch_norm():
  x = normed.images()[:1]
  assert graph.batch_normed(normed.apply, normed.parameters(), x) == normed.NORMED
  # A bias is none, nor is the factor of a layer scale.
  scaled = lambda p, x: (x @ p["w"] + p["b"][None]) * p["gamma"][None]
  params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "gamma": jnp.ones(4)}
  assert graph.batch_normed(scaled, params, jnp.ones((1, 3))) == ()
  images = np.zeros((1, 8, 8, 3), np.float32)
  assert graph.batch_normed(networks.apply, networks.parameters(), images) == ()


@pytest.mark.parametrize(("name", "without"), [("mobilenet_v2", ("classifier",)), ("vit_s", None)])
def test_models_with_batch_norm(name, without):
  module = nnx.eval_shape(lambda: models.create(name, **models.get(name).tiny))
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  names = [layer.name for layer in graph.layers(apply, params, x)]
  found = graph.batch_normed(apply, params, x)
  assert set(names) - set(found) == set(names[-1:] if without else names)


def test_it_is_the_modules_own_training_mode():
  module = models.create("resnet20", seed=0, width=4, depths=(1,), num_classes=3)
  apply, params = models.functional(module)
  params = models_for_test.randomize(params)
  module = models.with_params(module, params)
  x = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
  network = Network(apply, params, x[:1])
  plain = graph.weights(apply, params, x[:1])
  live = graph.batch_normed(apply, params, x[:1])
  flat, affine, running = models.flatten(params), {}, {}
  for name in live:
    bn = name.replace("conv", "bn")
    scale, mean = flat[f"{bn}/scale"], flat[f"{bn}/mean"]
    shift = mean * scale / jnp.sqrt(flat[f"{bn}/var"] + 1e-5)  # the folded bias is less by it
    affine[name] = Affine(scale, shift)
    running[name] = Moments(mean, flat[f"{bn}/var"])
  records = {}
  bare = lambda layer, x, w, contract: contract(x, plain[layer.name] if layer.name in live else w)
  rule = batch_norm.rule_normed(bare, affine, running, live, records)

  @jax.jit
  def run(params, x):
    return graph.with_rule(network.apply, rule)(params, x), records

  found, records = run(network.params, x)
  module.train()
  expected = nnx.jit(lambda module, x: module(x))(module, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  _, after = models.functional(module)  # its running averages moved by 0.1, too
  bn = models.flatten(after)["bn1/mean"]
  assert float(jnp.abs(bn - running["conv1"].mean).max()) > 1e-3
  momentum = module.bn1.momentum
  share = (1 - momentum) / batch_norm.MOMENTUM
  expected = running["conv1"].mean + share * (records["conv1"].mean - running["conv1"].mean)
  np.testing.assert_allclose(bn, expected, rtol=1e-4, atol=1e-5)


def test_training_starts_from_the_float_model(tmp_path):
  start = normed.start(tmp_path)
  network = start.network
  params, affine, running = initial(start, normed.NORMED)
  unfolded = normed.parameters()["first"]["kernel"]
  np.testing.assert_array_equal(params["first"]["kernel"], unfolded)
  again = folded(network, {"params": params, "affine": affine}, running, start.x[:1])
  np.testing.assert_allclose(again.float(start.x), network.float(start.x), rtol=1e-3, atol=1e-3)
  assert [layer.name for layer in again.layers] == [layer.name for layer in network.layers]
  assert not [p for p in models.flatten(again.params) if "affine" in p]


def test_moments_over_batches_are_those_of_all():
  network = normed.calibrated().network
  x = normed.images()
  parts = [x[:10], x[10:]]
  one = batch_norm.observe(network.apply, network.params, [x], rules.float_rule)
  two = batch_norm.observe(network.apply, network.params, parts, rules.float_rule)
  for name in normed.NORMED:
    np.testing.assert_allclose(one[name].mean, two[name].mean, atol=1e-5)
    np.testing.assert_allclose(one[name].var, two[name].var, rtol=1e-4, atol=1e-5)


def test_channels_are_the_layers_own():
  """Moments by NumPy, for results with channels last and elsewhere."""
  made, outputs = models_for_methods.made(), {}
  network = made.network

  @jax.jit
  def run(params, x):
    def keep(layer, x, w, contract):
      outputs[layer.name] = contract(x, w)
      return outputs[layer.name]

    graph.with_rule(network.apply, keep)(params, x)
    return outputs

  for name, y in run(network.params, made.images).items():
    layer = network.layer(name)
    rest = tuple(d for d in range(y.ndim) if d not in layer.y_dims)
    found = batch_norm.moments(layer, y)
    np.testing.assert_allclose(found.mean, np.asarray(y).mean(axis=rest).ravel(), atol=1e-5)
    whole = Affine(jnp.ones(layer.out_channels), jnp.zeros(layer.out_channels))
    out = batch_norm.moments(layer, batch_norm.normalized(layer, y, whole, found))
    np.testing.assert_allclose(out.mean, 0, atol=1e-4)
    np.testing.assert_allclose(out.var, 1, rtol=1e-2)
