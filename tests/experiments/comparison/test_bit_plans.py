"""Plans of the methods of a comparison keep their budgets; what is measured is measured once."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from experiments.comparison import sections
from experiments.comparison.bit_plans import Planner
from experiments.comparison.measured import Measured
from flexiq_jax import models
from flexiq_jax.calibrated import Calibrated, Observations
from flexiq_jax.methods import fusion, layerwise
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.network import Network
from flexiq_jax.runs.workdir import Workdir
from tests.methods import models_for_test
from tests.search import networks_for_test as networks

SELECTABLE = ("conv", "up", "down")


@functools.cache
def measured() -> Measured:
  m = models_for_test.made()
  return Measured(
    calibrated=Calibrated(m.network, [m.images], Observations(m.values, {}), m.ranges),
    apply=networks.apply,
    params=networks.parameters(),
    selectable=SELECTABLE,
    images=m.images,
    labels=m.labels,
    sensitivity=len(m.images),
    seed=0,
  )


def section(name, **changes):
  config = common.comparison("digits", "runlocal")
  config.comparison.update(changes, sections=(name,))
  (made,) = sections.of(config)
  return made, config.comparison


def planner(name, folder, found=None, **changes):
  made, part = section(name, **changes)
  return Planner(part, found or measured(), made, folder / name, Workdir(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def wide(folder):
  return planner("wide", folder, wide_bits=(2, 4, 8))


@pytest.mark.parametrize("method", ["clado", "clado_block", "clado_diagonal", "mpqco", "hawq"])
def test_plans_keep_the_average(wide, method):
  for budget in (4.0, 5.5, 8.0):
    plan = wide.plan(method, budget)
    assert set(plan.bits) == set(SELECTABLE)
    assert wide.average(plan.bits) <= budget + sections.TOLERANCE + 1e-9
    assert wide.cost_of(method)["forwards"] > 0


def test_measured_once(wide, folder):
  for method in ("clado", "clado_diagonal", "mpqco", "hawq"):
    wide.plan(method, 5.0)
  again = planner("wide", folder, wide_bits=(2, 4, 8))
  np.testing.assert_array_equal(again.losses().singles, wide.losses().singles)
  np.testing.assert_array_equal(again.objective("hawq"), wide.objective("hawq"))
  before = again.cost_of("clado")["forwards"]
  assert before == wide.cost_of("clado")["forwards"]
  events = [e["method"] for e in Workdir(folder).events("measured") if e["seconds"] > 0]
  assert events.count("mpqco") == 1


def test_a_part_of_the_images_is_measured(folder):
  half = len(measured().images) // 2
  part = dataclasses.replace(measured(), sensitivity=half)
  alone = dataclasses.replace(part, images=part.images[:half], labels=part.labels[:half])
  one, two = planner("main", folder / "a", part), planner("main", folder / "b", alone)
  for method in ("clado", "mpqco", "hawq"):
    np.testing.assert_array_equal(one.objective(method), two.objective(method))
    assert one.cost_of(method)["forwards"] == 0.5 * two.cost_of(method)["forwards"]


def test_quantune_fills_the_budget(folder):
  main = planner("main", folder)
  macs = {name: measured().network.layer(name).macs for name in SELECTABLE}
  total = sum(macs.values())
  for budget in (4.0, 5.0, 6.5, 8.0):
    bits = main.plan("quantune", budget).bits
    left = (budget - main.average(bits)) * total + 1e-6
    assert left >= 0
    assert all(4 * macs[n] > left for n, b in bits.items() if b == 4)
  assert main.cost_of("quantune")["forwards"] == 2


@given(budget=st.floats(2, 8), draw=st.integers(0, 5))
def test_random_plans_fill_the_budget(wide, budget, draw):
  plan = wide.random(budget, draw)
  assert plan == wide.random(budget, draw)
  macs = {name: measured().network.layer(name).macs for name in SELECTABLE}
  left = (budget - wide.average(plan.bits)) * sum(macs.values()) + 1e-6
  assert left >= 0
  widths = (2, 4, 8)
  for name, b in plan.bits.items():
    if b < 8:
      assert (widths[widths.index(b) + 1] - b) * macs[name] > left - 1e-3


def test_uniform_plan(wide):
  assert wide.plan("uniform", 5.0).bits == dict.fromkeys(SELECTABLE, 5)


def test_sizes_are_limited(folder):
  tensor = planner("clado_tensor", folder)
  params = {name: measured().network.layer(name).params for name in SELECTABLE}
  for share in (0.25, 0.4, 1.0):
    bits = tensor.plan("mpqco", share).bits
    size = sum(params[n] * b / 8 for n, b in bits.items())
    assert size <= share * sum(params.values()) * (1 + 1e-9)
  assert set(tensor.plan("mpqco", 0.25).bits.values()) == {2}


# 8 bits and floating point.


@pytest.fixture(scope="module")
def float8(folder):
  return planner("float8", folder)


def share_of(bits):
  """Share of the MACs in 8 bits."""
  macs = {name: measured().network.layer(name).macs for name in SELECTABLE}
  return sum(macs[n] for n, b in bits.items() if b == 8) / sum(macs.values())


@pytest.mark.parametrize("method", ["quantune", "clado_diagonal", "mpqco", "hawq", "random"])
def test_enough_is_in_8_bits(float8, method):
  for share in (0.0, 0.3, 0.7, 1.0):
    plan = float8.random(share, 1) if method == "random" else float8.plan(method, share)
    assert set(plan.bits) == set(SELECTABLE) and set(plan.bits.values()) <= {8, FLOAT}
    assert share_of(plan.bits) >= share - 1e-9
    assert float8.average(plan.bits) == pytest.approx(32 - 24 * share_of(plan.bits))


@pytest.mark.parametrize("method", ["clado_diagonal", "mpqco", "hawq"])
def test_floating_point_does_no_harm(float8, method):
  harm, exact = float8.objective(method).reshape(-1, 2).T
  assert (exact == 0).all() and np.ptp(harm) > 0
  # A trace of the Hessian is negative where random weights are no minimum of the loss.
  assert method == "hawq" or (harm > 0).all()
  plans = [dict(zip(SELECTABLE, b, strict=True)) for b in itertools.product((8, FLOAT), repeat=3)]
  for share in (0.2, 0.5, 0.8):
    least = min(
      sum(h for h, b in zip(harm, plan.values(), strict=True) if b == 8)
      for plan in plans
      if share_of(plan) >= share
    )
    found = float8.plan(method, share).bits
    assert sum(h for h, n in zip(harm, SELECTABLE, strict=True) if found[n] == 8) == (
      pytest.approx(least)
    )


def test_the_diagonal_is_the_divergence_of_single_layers(float8):
  m = measured()
  model = layerwise.Layerwise(m.network.apply, m.network.params, m.stacks(float8.section))
  plain = dict.fromkeys(model.stacks.names, FLOAT)
  log_p = log_softmax(model.simulated(plain, m.images))
  for name, found in zip(SELECTABLE, float8.objective("clado_diagonal")[::2], strict=True):
    log_q = log_softmax(model.simulated({**plain, name: 8}, m.images))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert found == pytest.approx(expected, rel=1e-2)
  # One pass for the model, one for what all layers share, and what follows each layer.
  assert 2 < float8.cost_of("clado_diagonal")["forwards"] < 2 + len(SELECTABLE)


def log_softmax(z):
  z = np.asarray(z, np.float64)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def test_layers_that_are_always_float_are_so_in_quantunes_run(folder, float8):
  """What comes before the first selectable layer is exact; with 8 bits it is not."""
  for made, exact in ((float8, True), (planner("main", folder), False)):
    runs = made.runs()
    first = next(i for i, o in enumerate(runs.operations) if o.layer == SELECTABLE[0])
    assert (runs.error[:first] == 0).all() == exact
    assert runs.error[first] > 0
  best = float8.quantune_forms(0.5)[0]
  kept = [b for b, n in zip(best.node_bits, nodes(float8, best), strict=True) if n == "stem"]
  assert kept == [FLOAT]


def nodes(made, plan):
  """The layer of each node of a plan."""
  return [node.layer for node in fusion.nodes(made.runs().operations, plan.grouping)]


def test_infeasible_budget_names_the_smallest(folder):
  with pytest.raises(ValueError, match=r"size.*0\.25"):
    planner("clado_tensor", folder).plan("mpqco", 0.2)


def of_resnet18() -> Measured:
  """The graph of a network with shortcuts, and nothing else."""
  module = nnx.eval_shape(lambda: models.create("resnet18", seed=0, **models.get("resnet18").tiny))
  apply, params = models.functional(module)
  x = np.zeros((1, *module.input_shape), np.float32)
  real = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
  network = Network(apply, real, x)
  names = tuple(layer.name for layer in network.layers[1:-1])
  return Measured(
    calibrated=Calibrated(network, [x], Observations({}, {}), measured().calibrated.ranges),
    apply=apply,
    params=params,
    selectable=names,
    images=x,
    labels=np.zeros(1, np.int32),
    sensitivity=1,
    seed=0,
  )


def test_blocks_and_ties():
  made = of_resnet18()
  assert made.blocks() == {
    "layer1/0/conv1": 0,
    "layer1/0/conv2": 0,
    "layer2/0/conv1": 1,
    "layer2/0/conv2": 1,
    "layer2/0/downsample/0": 1,
  }
  assert made.tied() == (("layer2/0/conv2", "layer2/0/downsample/0"),)
