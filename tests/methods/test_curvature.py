"""Traces against exact Hessians, MPQCO's metric against Jacobians, errors against NumPy."""

import functools

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


def hessian(name, rows):
  """Of the mean loss over images by one layer's weights, float64."""

  def loss(w):
    log_p = jax.nn.log_softmax(run_with({name: w}, models.made().images[rows]))
    return -log_p[jnp.arange(len(log_p)), models.made().labels[rows]].mean()

  w = models.made().network.weights[name]
  return np.asarray(jax.jit(jax.hessian(loss))(w), np.float64).reshape(w.size, w.size)


@functools.cache
def exact_mean_trace(name):
  return np.diag(hessian(name, slice(None))).mean()


@pytest.mark.parametrize(("block", "probes"), [(16, 2000), (5, 1000)])
def test_traces_are_the_exact_hessians_within_their_error(block, probes):
  """Also with a last block that has one image of its own."""
  made = models.made()
  found = curvature.mean_traces(
    *(jax.random.key(0), made.network.apply, made.network.params, made.network.layers),
    *(made.images, made.labels),
    names=NAMES,
    probes=probes,
    block=block,
  )
  for i, name in enumerate(NAMES):
    exact = exact_mean_trace(name)
    assert abs(found.value[i] - exact) < 4 * found.error[i]
    assert 0 < found.error[i] < 0.25 * abs(exact)


def test_standard_errors_are_those_of_the_estimator():
  """The variance of v' H v for random signs is 2 sum_{i != j} H_ij^2; blocks are independent."""
  made, probes = models.made(), 1000
  found = curvature.mean_traces(
    *(jax.random.key(1), made.network.apply, made.network.params, made.network.layers),
    *(made.images[:12], made.labels[:12]),
    names=("head",),
    probes=probes,
    block=8,
  )
  variance, size = 0.0, made.network.weights["head"].size
  for rows, share in ((slice(8), 8 / 12), (slice(8, 12), 4 / 12)):
    own = share * hessian("head", rows)
    variance += 2 * (np.square(own).sum() - np.square(np.diag(own)).sum()) / probes
  np.testing.assert_allclose(found.error, np.sqrt(variance) / size, rtol=0.1)


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
