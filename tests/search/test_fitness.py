"""Fitness of populations equals models run one by one, however they are cut and shared."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.network import Network
from flexiq_jax.search.fitness import Fitness, population_mesh
from tests.runs_for_test import several_devices
from tests.search import networks_for_test
from tests.search.networks_for_test import made


def make(examples=None, network=None, model=None, **options):
  m = made()
  examples = m.images if examples is None else examples
  return Fitness(network or m.network, model or m.model, m.space, examples, **options)


@pytest.mark.parametrize("distance", ["l2", "kl"])
@pytest.mark.parametrize(
  "options",
  [
    {"capacity": 8, "block": 16},
    {"capacity": 3, "block": 1},
    {"capacity": 4, "block": 5},  # the last block repeats four examples
    {"capacity": 7, "block": 6, "width": 3},
    {"capacity": 2, "block": 64, "width": 3},  # of which there are two
  ],
  ids=str,
)
def test_equals_models_run_one_by_one(distance, options):
  m, masks = made(), made().random_masks(8)
  fitness = make(distance=distance, **options)
  found = fitness.per_example(masks)
  expected = np.stack([m.distances(mask, distance) for mask in masks])
  assert found.shape == (8, 16)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.max())
  np.testing.assert_allclose(found.mean(axis=1), expected.mean(axis=1), rtol=1e-6)
  assert (found[0] == 0).all()
  assert (expected[1:].mean(axis=1) > 1e-4).all()
  # One individual, and none, are the same program.
  np.testing.assert_array_equal(fitness(masks[5:6]), found[5:6].mean(axis=1, dtype=np.float64))
  assert fitness(masks[:0]).shape == (0,)
  assert fitness.traces == 1
  assert fitness.forwards == 9
  assert fitness.width == min(options.get("width", 1), fitness.capacity)


def test_parts_are_whole_blocks_and_count_as_such():
  masks = made().random_masks(3)
  fitness = make(capacity=2, block=5)  # blocks of 5, 5, 5 and 1 examples
  whole = fitness.per_example(masks)
  before = fitness.forwards
  for part, seen in (
    ((0, 0.25), slice(0, 5)),
    ((0.25, 0.5), slice(5, 10)),
    ((0.5, 1), slice(10, 16)),
    ((0.6, 0.65), slice(10, 15)),  # a block at least
    ((0.99, 1.0), slice(15, 16)),
  ):
    np.testing.assert_array_equal(fitness.per_example(masks, part), whole[:, seen])
    np.testing.assert_allclose(fitness(masks, part), whole[:, seen].mean(axis=1), rtol=1e-6)
  assert fitness.forwards == pytest.approx(before + 2 * 3 * (5 + 5 + 6 + 5 + 1) / 16)
  assert fitness.traces == 1


def test_budget_lowers_the_block():
  masks, free = made().random_masks(4), make(capacity=4, block=16)
  assert free.block == 16
  least = make(capacity=4, block=1)
  assert least.bytes < free.bytes
  middle = (least.bytes + free.bytes) / 2
  fitness = make(capacity=4, block=16, memory=middle / 2**30)
  assert 1 < fitness.block < 16
  assert fitness.bytes <= middle
  np.testing.assert_allclose(fitness(masks), free(masks), rtol=1e-6)
  wide = make(capacity=4, block=4, width=4)
  narrow = make(capacity=4, block=4, width=4, memory=(wide.bytes - 1) / 2**30)
  assert (narrow.width, narrow.block) == (2, 4)
  np.testing.assert_allclose(narrow(masks), free(masks), rtol=1e-6)


def test_too_small_a_budget_says_what_is_needed():
  needed = f"{make(capacity=4, block=1).bytes / 2**30:.3g}"
  with pytest.raises(ValueError, match=r"memory: 1e-06 GiB is too little; one individual") as error:
    make(capacity=4, memory=1e-6)
  assert f"with the 16 search examples, takes {needed} GiB" in str(error.value)


def test_weights_that_are_nan_are_refused():
  params = networks_for_test.parameters() | {"bias": jnp.full(networks_for_test.CLASSES, jnp.nan)}
  network = Network(networks_for_test.apply, params, made().images[:1])
  with pytest.raises(
    ValueError, match="8-bit model's logits are not finite on the search examples"
  ):
    make(network=network)


def broken_model(limit=1e5):
  """A network that gives NaN where the first group of `head` is in 4 bits."""
  m = made()

  def apply(params, x):
    z = networks_for_test.apply(params, x)
    return z + jnp.where(jnp.abs(z) > limit, jnp.nan, 0.0)

  head = m.model["head"]
  low = dataclasses.replace(head.low, bias=head.low.bias.at[0].set(2**30))
  network = Network(apply, networks_for_test.parameters(), m.images[:1])
  return network, {**m.model, "head": dataclasses.replace(head, low=low)}


def test_mask_that_gives_nan_is_nan_and_harms_no_other():
  network, model = broken_model()
  masks = made().random_masks(6)
  broken = masks[:, made().space.index("head", 0)]
  assert 0 < broken.sum() < 6
  for options in ({}, {"width": 4}):
    values = make(network=network, model=model, capacity=4, block=5, **options)(masks)
    np.testing.assert_array_equal(np.isnan(values), broken)
    np.testing.assert_allclose(
      values[~broken], networks_for_test.fitness()(masks[~broken]), rtol=1e-5
    )


@pytest.mark.parametrize(
  ("masks", "part", "message"),
  [
    (np.zeros((2, 17), bool), (0, 1), r"masks: bool \[2, 17\], expected bool \[P, 18\]"),
    (np.zeros(18, bool), (0, 1), r"masks: bool \[18\]"),
    (np.zeros((2, 18)), (0, 1), r"masks: float64 \[2, 18\]"),
    (np.zeros((2, 18), bool), (0.5, 0.5), r"part: \(0.5, 0.5\), expected 0 <= from < to <= 1"),
    (np.zeros((2, 18), bool), (0, 1.5), "part"),
    (np.zeros((2, 18), bool), (-0.1, 1), "part"),
  ],
)
def test_refuses_masks(masks, part, message):
  with pytest.raises(ValueError, match=message):
    networks_for_test.fitness()(masks, part)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"distance": "l1"}, "distance: 'l1' is not one of l2, kl"),
    (
      {"examples": np.zeros((0, 8, 8, 3), np.float32)},
      "examples, capacity, block, width: 0, 32, 64, None; at",
    ),
    ({"capacity": 0}, "capacity"),
    ({"block": 0}, "block"),
    ({"width": 0}, "width"),
    ({"width": -2}, "width"),
  ],
)
def test_refuses_options(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


_DEVICES = """
import functools, json
import jax, numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
from flexiq_jax.search import Fitness, SearchSettings, evolution, gram, population_mesh
from flexiq_jax.search.record import Record
from tests.search import networks_for_test

m = networks_for_test.made()
greedy = networks_for_test.greedy()
mesh = population_mesh()
assert jax.device_count() == mesh.devices.size == 8

def values(fitness):
  out = fitness(m.random_masks(11)).tolist()
  assert fitness.traces == 1 and fitness.forwards == 11
  return out

out = []
for mesh in (None, mesh):
  make = lambda **options: Fitness(m.network, m.model, m.space, m.images, mesh=mesh, **options)
  found = [values(make(capacity=3, block=5))]
  fitness = make(capacity=16, block=4)
  assert fitness.capacity == 16
  found.append(values(fitness))
  settings = SearchSettings(generations=3, population=10, elites=2, halving=True)
  start = functools.partial(Record, fitness, seed=0)
  found.append(evolution.run(start, m.scores, settings, [greedy]).order.tolist())
  settings = SearchSettings(levels=(0.5,), candidates=2, block=16)
  found.append(gram.run(start, m.scores, settings, [greedy]).order.tolist())
  out.append(found)
print(json.dumps(out))
"""


def test_devices_share_a_population():
  """In a process of its own, since the number of devices is a matter of the start."""
  root = pathlib.Path(__file__).parent.parent.parent
  result = subprocess.run(
    (sys.executable, "-W", "error", "-c", _DEVICES),
    cwd=root,
    env={**os.environ, "XLA_FLAGS": several_devices(8), "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  one, eight = json.loads(result.stdout.splitlines()[-1])
  expected = networks_for_test.fitness()(made().random_masks(11))
  for values in (*one[:2], *eight[:2]):
    np.testing.assert_allclose(values, expected, rtol=1e-5)
  for order, same in zip(one[2:], eight[2:], strict=True):
    assert order == same
    assert order != networks_for_test.greedy().tolist()


def test_no_mesh_of_one_device():
  assert jax.device_count() == 1
  assert population_mesh() is None
