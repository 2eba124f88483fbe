"""Plans of the methods of a comparison keep their budgets; what is measured is measured once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from experiments import sections
from experiments.bit_plans import Measured, Planner
from flexiq_jax import flexiq, models
from flexiq_jax.metrics import Writer
from tests.methods import models_for_test
from tests.search import networks_for_test as networks

SELECTABLE = ("conv", "up", "down")


@functools.cache
def measured() -> Measured:
  m = models_for_test.made()
  return Measured(
    network=m.network,
    apply=networks.apply,
    params=networks.parameters(),
    observations=flexiq.Observations(m.values, {}),
    ranges=m.ranges,
    selectable=SELECTABLE,
    batches=[m.images],
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
  return Planner(part, found or measured(), made, folder / name, Writer(folder))


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
  events = [e["method"] for e in Writer(folder).events("measured") if e["seconds"] > 0]
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


def test_infeasible_budget_names_the_smallest(folder):
  with pytest.raises(ValueError, match=r"size.*0\.25"):
    planner("clado_tensor", folder).plan("mpqco", 0.2)


def of_resnet18(folder):
  """A planner that has seen the graph of a network with shortcuts, and nothing else."""
  module = nnx.eval_shape(lambda: models.create("resnet18", seed=0, **models.get("resnet18").tiny))
  apply, params = models.functional(module)
  x = np.zeros((1, *module.input_shape), np.float32)
  real = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
  network = flexiq.Network(apply, real, x)
  names = tuple(layer.name for layer in network.layers[1:-1])
  found = Measured(
    network=network,
    apply=apply,
    params=params,
    observations=flexiq.Observations({}, {}),
    ranges=measured().ranges,
    selectable=names,
    batches=[x],
    images=x,
    labels=np.zeros(1, np.int32),
    sensitivity=1,
    seed=0,
  )
  return planner("main", folder, found)


def test_blocks_and_ties(tmp_path):
  made = of_resnet18(tmp_path)
  assert made.blocks() == {
    "layer1/0/conv1": 0,
    "layer1/0/conv2": 0,
    "layer2/0/conv1": 1,
    "layer2/0/conv2": 1,
    "layer2/0/downsample/0": 1,
  }
  assert made.tied() == (("layer2/0/conv2", "layer2/0/downsample/0"),)
