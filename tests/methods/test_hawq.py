"""HAWQ-v3: the published bits of ResNet-18, and traces against exact Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from flexiq_jax.methods import Choices, hawq, solve
from tests.methods import hawq_resnet18 as resnet18

CHOICES = Choices.create(
  resnet18.NAMES,
  resnet18.BITS,
  {
    "size": hawq.size_megabytes(resnet18.PARAMETERS, resnet18.BITS),
    "bops": hawq.bit_operations(resnet18.MACS, resnet18.BITS),
    "latency": resnet18.LATENCY,
  },
  tied=resnet18.TIED,
)


def program(shares):
  return hawq.problem(CHOICES, resnet18.MEAN_TRACE, resnet18.SQUARED_ERROR, shares)


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
  assert all(plan.costs[c] <= CHOICES.between(c, s) for c, s in shares.items())
  assert plan.objective == pytest.approx(solve(program(shares), "enumerate_all").objective)
  assert plan.objective >= solve(program({"bops": 0.5})).objective
  assert all(plan.bits[a] == plan.bits[b] for a, b in resnet18.TIED)


@pytest.mark.parametrize(("bits", "published", "bops"), [(8, 11.1, 1 / 16), (4, 5.8, 1 / 64)])
def test_costs_of_uniform_bits(bits, published, bops):
  """First layer and classifier, 8-bit and left out, are 0.5 MB of the published size."""
  x = CHOICES.pick(dict.fromkeys(resnet18.NAMES, bits))
  assert CHOICES.costs["size"] @ x == pytest.approx(published - 0.5, abs=0.05)
  assert CHOICES.costs["bops"] @ x == pytest.approx(resnet18.MACS.sum() * bops)


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
  found = hawq.hutchinson(jax.random.key(1), jax.jit(mlp_loss), params, 2000, batch=100)
  flat, unflatten = ravel_pytree(params)
  own = jax.jit(jax.hessian(lambda x: mlp_loss(unflatten(x))))(flat)
  exact = jax.tree.map(jnp.sum, unflatten(jnp.diag(own)))
  leaves = zip(*(jax.tree.leaves(t) for t in (found.value, found.error, exact)), strict=True)
  for value, error, trace in leaves:
    assert abs(trace) > 10 * error  # else the next line would show little
    assert abs(value - trace) < 4 * error


def quadratic(matrix):
  return lambda x: 0.5 * x @ matrix @ x


def test_standard_error_is_that_of_the_estimator():
  """The variance of v' H v for random signs is 2 sum_{i != j} H_ij^2."""
  a = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
  matrix = a + a.T
  probes = 4000
  found = hawq.hutchinson(jax.random.key(0), quadratic(matrix), jnp.zeros(8), probes)
  off = matrix - np.diag(np.diag(matrix))
  assert found.error == pytest.approx((2 * (off**2).sum() / probes) ** 0.5, rel=0.1)
  assert abs(found.value - np.trace(matrix)) < 4 * found.error


def test_diagonal_hessians_need_no_luck():
  found = hawq.hutchinson(jax.random.key(3), lambda x: jnp.sum(x**3), jnp.arange(4.0), 3)
  assert found.value == pytest.approx(6 * (0 + 1 + 2 + 3))
  assert found.error == pytest.approx(0, abs=1e-5)


def test_batches_do_not_change_the_estimate():
  params = mlp_params()
  one, many = (
    hawq.hutchinson(jax.random.key(0), mlp_loss, params, 7, batch=batch) for batch in (1, 16)
  )
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_hutchinson_refuses():
  with pytest.raises(ValueError, match="probes: 1; expected at least 2"):
    hawq.hutchinson(jax.random.key(0), jnp.sum, jnp.ones(3), 1)
  with pytest.raises(ValueError, match="params: an array of int32"):
    hawq.hutchinson(jax.random.key(0), jnp.sum, {"w": jnp.ones(3), "n": jnp.ones(3, int)}, 2)
