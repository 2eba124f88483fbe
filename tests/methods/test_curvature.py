"""Traces against exact Hessians, MPQCO's metric against Jacobians, errors against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.methods import curvature
from tests import layers_for_test
from tests.methods import models_for_test as models

BITS = (2, 4)
NAMES = ("conv", "head")


def run_with(weights, x):
  """The float model with some weights replaced."""
  made = models.made()

  def rule(layer, x, w, contract):
    return contract(x, weights.get(layer.name, w))

  return graph.with_rule(made.network.apply, rule)(made.network.params, x)


def errors_of(name):
  """Q_b(W) - W for each width, by the canonical form, in NumPy."""
  made, stack = models.made(), models.layerwise_model(BITS).stacks.stack(name)
  layer, w = made.network.layer(name), np.asarray(made.network.weights[name], np.float64)
  canonical, out = layer.canonical(w), []
  for codes, scale in zip(np.asarray(stack.w), np.asarray(stack.w_scale, np.float64), strict=True):
    c = layer.canonical(codes.astype(np.float64))
    for g in range(layer.groups):
      for n in range(layer.out_channels // layer.groups):
        c[g, :, :, n] *= scale[g * (layer.out_channels // layer.groups) + n]
    out.append(layer.native(c - canonical))
  return np.stack(out)


def test_squared_errors():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  layers, weights = made.network.layers, made.network.weights
  found = curvature.squared_errors(layers, weights, stacks)
  expected = [[np.square(e).sum() for e in errors_of(name)] for name in models.NAMES]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  some = curvature.squared_errors(layers, weights, stacks, ["head", "conv"])
  np.testing.assert_array_equal(some, found[[5, 2]])


@pytest.mark.parametrize("name", layers_for_test.CASES)
def test_dequantized_weights_of_every_kind_of_layer(name):
  """By what they contract to: scales belong to output channels."""
  case = layers_for_test.CASES[name]
  made, layer = layers_for_test.random_layer(case), case.layer
  stack = curvature.Stack(
    made.q.w[None], made.q.w_scale[None], made.q.x_scale[None], jnp.zeros((1, 2)), signed=True
  )
  x = np.random.default_rng(0).integers(-9, 9, case.x)
  found = case.contract(jnp.asarray(x, jnp.float32), curvature.dequantized(layer, stack, 0))
  acc = case.exact(x, made.w8)
  expected = acc * layer.y_vector(np.asarray(made.q.w_scale, np.float64), acc.shape)
  np.testing.assert_array_equal(found, expected)


def test_traces_are_the_exact_hessians_within_their_error():
  made, key = models.made(), jax.random.key(0)
  found = curvature.mean_traces(
    *(key, made.network.apply, made.network.params, made.network.layers),
    *(made.images, made.labels),
    names=NAMES,
    probes=2000,
    block=16,
  )

  def loss(w, name):
    log_p = jax.nn.log_softmax(run_with({name: w}, made.images))
    return -log_p[jnp.arange(len(log_p)), made.labels].mean()

  for i, name in enumerate(NAMES):
    w = made.network.weights[name]
    hessian = np.asarray(jax.jit(jax.hessian(loss), static_argnums=1)(w, name)).reshape(w.size, -1)
    exact = np.trace(hessian.astype(np.float64)) / w.size
    assert abs(found.value[i] - exact) < 4 * found.error[i]
    assert 0 < found.error[i] < 0.25 * abs(exact)


def test_traces_do_not_depend_on_blocks():
  made = models.made()

  def traces(block):
    return curvature.mean_traces(
      *(jax.random.key(1), made.network.apply, made.network.params, made.network.layers),
      *(made.images, made.labels),
      probes=2,
      block=block,
    )

  whole, parts = traces(100), traces(5)  # the last block has one image of its own
  np.testing.assert_allclose(parts.value, whole.value, rtol=1e-3, atol=1e-6)
  np.testing.assert_allclose(parts.error, whole.error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("block", [16, 5])
def test_relative_logits_are_those_of_the_jacobian(block):
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  shares = []
  found = curvature.relative_logits(
    *(made.network.apply, made.network.params, made.network.layers, stacks),
    *(made.images, made.labels),
    names=NAMES,
    block=block,
    report=shares.append,
  )
  assert shares == ([1.0] if block == 16 else [5 / 16, 10 / 16, 15 / 16, 1.0])
  rows = np.arange(len(made.images))
  z = np.asarray(made.network.float(made.images), np.float64)[rows, made.labels]
  expected = []
  for name in NAMES:
    jacobian = jax.jit(jax.jacrev(lambda w, name=name: run_with({name: w}, made.images)))
    slopes = np.asarray(jacobian(made.network.weights[name]), np.float64)[rows, made.labels]
    for error in errors_of(name):
      dz = (slopes * error).reshape(len(rows), -1).sum(axis=1)
      expected.append(np.square(dz / z).mean() / 2)
  np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"probes": 1}, "probes: 1; expected at least 2"),
    ({"block": 0}, "block: .* 0; expected"),
    ({"names": ("haed",)}, "names: no layer 'haed'; closest names: head"),
  ],
)
def test_wrong_arguments_are_refused(options, message):
  made = models.made()
  arguments = (made.network.apply, made.network.params, made.network.layers)
  with pytest.raises(ValueError, match=message):
    curvature.mean_traces(jax.random.key(0), *arguments, made.images, made.labels, **options)


def test_labels_that_do_not_fit_are_refused():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  arguments = (made.network.apply, made.network.params, made.network.layers, stacks)
  with pytest.raises(ValueError, match="images, labels, block"):
    curvature.relative_logits(*arguments, made.images, made.labels[:3])


def test_logits_of_zero_are_refused():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  apply = lambda params, x: made.network.apply(params, x) * 0.0
  with pytest.raises(ValueError, match="logit of a label is 0"):
    curvature.relative_logits(
      *(apply, made.network.params, made.network.layers, stacks),
      *(made.images, made.labels),
      names=("head",),
    )
