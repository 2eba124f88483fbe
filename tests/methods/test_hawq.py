"""HAWQ-v3: the published bits of ResNet-18, and traces against exact Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flexiq_jax.methods import hawq
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.program import Choices, Problem, solve
from tests.methods import hawq_resnet18 as resnet18
from tests.methods import models_for_test as models
from tests.methods.models_for_test import errors_of, run_with
from tests.methods.program.programs_for_test import between
from tests.methods.starts_for_test import made, resnet18_start

BITS = (2, 4)
NAMES = ("conv", "head")


def size_megabytes(parameters, bits):
  """Size of the weights, float64 `[I, B]`, in MB of 2^20 bytes."""
  return np.multiply.outer(np.asarray(parameters, np.float64), bits) / 8 / 2**20


def bit_operations(macs, bits):
  """HAWQ's unit, a 32 by 32 bit MAC: MACs * (b / 32)^2, float64 `[I, B]`."""
  return np.multiply.outer(np.asarray(macs, np.float64), np.square(bits) / 1024.0)


CHOICES = Choices.create(
  resnet18.NAMES,
  resnet18.BITS,
  {
    "size": size_megabytes(resnet18.PARAMETERS, resnet18.BITS),
    "bops": bit_operations(resnet18.MACS, resnet18.BITS),
    "latency": resnet18.LATENCY,
  },
  tied=resnet18.TIED,
)


def program(shares):
  """Limits lie a share of the way from all layers at 4 bits to all at 8."""
  limits = {cost: between(CHOICES, cost, share) for cost, share in shares.items()}
  objective = hawq.omega(resnet18.MEAN_TRACE, resnet18.SQUARED_ERROR)
  return Problem(choices=CHOICES, objective=objective, limits=limits)


@pytest.mark.parametrize("solver", ["milp", "enumerate_all", "local_search"])
@pytest.mark.parametrize(("cost", "share"), resnet18.PUBLISHED)
def test_published_bits_of_resnet18(cost, share, solver):
  problem = program({cost: share})
  plan = solve(problem, solver)
  eight, objective = resnet18.PUBLISHED[cost, share]
  expected = {name: 8 if i in eight else 4 for i, name in enumerate(resnet18.NAMES)}
  assert plan.bits == expected
  all_four = problem.value(CHOICES.uniform(min))
  assert plan.objective - all_four == pytest.approx(objective, abs=6e-5)


def test_several_limits_hold_at_once():
  shares = {"size": 0.75, "bops": 0.5, "latency": 0.5}
  plan = solve(program(shares), "milp")
  assert all(plan.costs[c] <= between(CHOICES, c, s) for c, s in shares.items())
  assert plan.objective == pytest.approx(solve(program(shares), "enumerate_all").objective)
  assert plan.objective >= solve(program({"bops": 0.5})).objective
  assert all(plan.bits[a] == plan.bits[b] for a, b in resnet18.TIED)


@pytest.mark.parametrize(("bits", "published", "bops"), [(8, 11.1, 1 / 16), (4, 5.8, 1 / 64)])
def test_costs_of_uniform_bits(bits, published, bops):
  """First layer and classifier, 8-bit and left out, are 0.5 MB of the published size."""
  x = CHOICES.pick(dict.fromkeys(resnet18.NAMES, bits))
  assert CHOICES.costs["size"] @ x == pytest.approx(published - 0.5, abs=0.05)
  assert CHOICES.costs["bops"] @ x == pytest.approx(resnet18.MACS.sum() * bops)


def test_layers_that_meet_in_an_addition_are_tied(tmp_path):
  method = made(hawq.Hawq, resnet18_start(tmp_path))
  assert method.tied() == (("layer2/0/conv2", "layer2/0/downsample/0"),)
  assert method.choices.tied == method.tied()


def test_omega_is_trace_times_error():
  np.testing.assert_allclose(hawq.omega([2, 3], [[1, 10], [4, 5]]), [2, 20, 12, 15])


@pytest.mark.parametrize(
  ("trace", "error", "message"),
  [
    ([1, 2], [[1, 2]], r"squared_error: shape \(1, 2\) for \(2,\) traces"),
    ([1, np.nan], [[1, 2], [3, 4]], "mean_trace: 1 numbers are not finite"),
    ([1, 2], [[1, 2], [3, np.inf]], "squared_error: 1 numbers are not finite"),
    ([1, 2], [[1, 2], [3, -4]], "squared_error: -4.0; expected no negative ones"),
  ],
)
def test_omega_refuses(trace, error, message):
  with pytest.raises(ValueError, match=message):
    hawq.omega(trace, error)


# Traces.


def hutchinson(key, loss, params, probes):
  """(traces, their standard errors), each like the parameters, a number for each."""
  sample = jax.jit(lambda key: hawq.trace_sample(key, loss, params))
  samples = jax.lax.map(sample, jax.random.split(key, probes), batch_size=100)
  value = jax.tree.map(lambda s: s.mean(), samples)
  return value, jax.tree.map(lambda s: s.std(ddof=1) / probes**0.5, samples)


def mlp_loss(params):
  x = jnp.linspace(-1, 1, 12).reshape(4, 3)
  hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
  return jnp.mean(jax.nn.logsumexp(hidden @ params["out"], axis=1) - (hidden @ params["out"])[:, 0])


def mlp_params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "in": {"w": jax.random.normal(keys[0], (3, 5)), "b": jax.random.normal(keys[1], (5,))},
    "out": jax.random.normal(keys[2], (5, 4)),
  }


def test_traces_of_a_network_are_within_their_errors():
  params = mlp_params()
  value, error = hutchinson(jax.random.key(1), jax.jit(mlp_loss), params, 2000)
  flat, unflatten = ravel_pytree(params)
  own = jax.jit(jax.hessian(lambda x: mlp_loss(unflatten(x))))(flat)
  exact = jax.tree.map(jnp.sum, unflatten(jnp.diag(own)))
  leaves = zip(*(jax.tree.leaves(t) for t in (value, error, exact)), strict=True)
  for one, off, trace in leaves:
    assert abs(trace) > 10 * off  # else the next line would show little
    assert abs(one - trace) < 4 * off


def quadratic(matrix):
  return lambda x: 0.5 * x @ matrix @ x


def test_standard_error_is_that_of_the_estimator():
  """The variance of v' H v for random signs is 2 sum_{i != j} H_ij^2."""
  a = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
  matrix = a + a.T
  probes = 4000
  value, error = hutchinson(jax.random.key(0), quadratic(matrix), jnp.zeros(8), probes)
  off = matrix - np.diag(np.diag(matrix))
  assert error == pytest.approx((2 * (off**2).sum() / probes) ** 0.5, rel=0.1)
  assert abs(value - np.trace(matrix)) < 4 * error


def test_diagonal_hessians_need_no_luck():
  value, error = hutchinson(jax.random.key(3), lambda x: jnp.sum(x**3), jnp.arange(4.0), 3)
  assert value == pytest.approx(6 * (0 + 1 + 2 + 3))
  assert error == pytest.approx(0, abs=1e-5)


def test_squared_errors():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  found = hawq.squared_errors(made.network, stacks, models.NAMES)
  expected = [[np.square(e).sum() for e in errors_of(name, BITS)] for name in models.NAMES]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  some = hawq.squared_errors(made.network, stacks, ["head", "conv"])
  np.testing.assert_array_equal(some, found[[5, 2]])


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
  found = hawq.mean_traces(
    *(jax.random.key(0), made.network, made.examples, NAMES),
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
  found = hawq.mean_traces(
    *(jax.random.key(1), made.network, Examples(made.images[:12], made.labels[:12]), ("head",)),
    probes=probes,
    block=8,
  )
  variance, size = 0.0, made.network.weights["head"].size
  for rows, share in ((slice(8), 8 / 12), (slice(8, 12), 4 / 12)):
    own = share * hessian("head", rows)
    variance += 2 * (np.square(own).sum() - np.square(np.diag(own)).sum()) / probes
  np.testing.assert_allclose(found.error, np.sqrt(variance) / size, rtol=0.1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"probes": 1}, "probes: 1; at least 2 are accepted"),
    ({"block": 0}, "block: 0 is not a positive integer"),
    ({"names": ("haed",)}, "name: no layer 'haed'; closest names: head"),
  ],
)
def test_wrong_arguments_are_refused(options, message):
  made = models.made()
  given = {"names": NAMES} | options
  with pytest.raises(ValueError, match=message):
    hawq.mean_traces(jax.random.key(0), made.network, made.examples, **given)
