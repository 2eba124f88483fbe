"""Plans of all methods keep their budgets; what is measured is measured once."""

import dataclasses
import itertools

import numpy as np
import pytest

from flexiq_jax.methods import METHODS, Examples, Method, find
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.task import TOLERANCE
from flexiq_jax.runs.workdir import Workdir
from tests.methods.starts_for_test import (
  FLOAT8,
  MAIN,
  NAMES,
  SIZE,
  WIDE,
  calibrated,
  macs,
  made,
  start_of,
)

WITH_FLOAT = ("quantune", "random", "clado_diagonal", "mpqco", "hawq")
LAYERWISE = ("random", "clado", "clado_block", "clado_diagonal", "mpqco", "hawq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def wide(folder):
  return start_of(WIDE, folder / "wide")


@pytest.fixture(scope="module")
def float8(folder):
  return start_of(FLOAT8, folder / "float8")


def plan(name, start, budget):
  (found,) = made(METHODS[name], start, random_plans=1).at(budget)
  return found


# The registry.


def test_methods_by_task():
  fit = {task: [n for n, m in METHODS.items() if m.fits(task)] for task in (MAIN, WIDE, SIZE)}
  assert fit[MAIN] == [*METHODS]
  # FlexiQ and uniform bits are no choice for each layer; QuantuneV2 has two precisions.
  assert fit[WIDE] == fit[SIZE] == [*LAYERWISE]
  assert tuple(n for n, m in METHODS.items() if m.fits(FLOAT8)) == WITH_FLOAT
  assert not METHODS["quantune"].fits(dataclasses.replace(MAIN, bits=(4, 6, 8)))
  assert {name for name, m in METHODS.items() if m.reference} == {"uniform", "random"}


def test_methods_are_found():
  assert find("hawq") is METHODS["hawq"]
  assert find("flexiq_jax.methods.hawq:Hawq") is METHODS["hawq"]
  assert all(issubclass(m, Method) and m.name == name for name, m in METHODS.items())


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("hakw", "'hakw' is not one of flexiq_greedy, flexiq, .*, nor package.module:Class"),
    ("flexiq_jax.method:X", r"'flexiq_jax.method:X' cannot be imported \(No module named"),
    ("flexiq_jax.methods.hawq:Hakw", "cannot be imported .*has no attribute 'Hakw'"),
    ("flexiq_jax.methods.hawq:omega", "'.*:omega' is no subclass of flexiq_jax.methods.Method"),
  ],
)
def test_unknown_methods_are_refused(name, message):
  with pytest.raises(ValueError, match=message):
    find(name)


@pytest.mark.parametrize(
  ("method", "settings", "message"),
  [
    ("hawq", {"probes": 1}, "probes: 1; at least 2 are accepted"),
    ("hawq", {"block": 0}, "block: 0 is not a positive integer"),
    ("mpqco", {"time_limit": 0.0}, "time_limit: 0.0; seconds above 0"),
    ("clado", {"loss": "mse"}, "loss: 'mse' is not one of cross_entropy, kl"),
    ("random", {"random_plans": True}, "random_plans: True is not a positive integer"),
    ("quantune", {"block": -1}, "block: -1 is not a positive integer"),
  ],
)
def test_wrong_settings_are_refused(method, settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    METHODS[method].Settings(**settings)


# Plans.


@pytest.mark.parametrize("method", ["clado", "clado_block", "clado_diagonal", "mpqco", "hawq"])
def test_plans_keep_the_average(wide, method):
  one = made(METHODS[method], wide)
  for budget in (4.0, 5.5, 8.0):
    (found,) = one.at(budget)
    assert set(found.bits) == set(NAMES)
    assert wide.average(found.bits) <= budget + TOLERANCE + 1e-9
    assert one.took()["forwards"] > 0


def test_measured_once(wide, folder):
  for method in ("clado", "clado_diagonal", "mpqco", "hawq"):
    plan(method, wide, 5.0)
  again = start_of(WIDE, folder / "wide")
  one, other = (made(METHODS["clado"], start) for start in (wide, again))
  np.testing.assert_array_equal(other.losses().singles, one.losses().singles)
  one, other = (made(METHODS["hawq"], start) for start in (wide, again))
  np.testing.assert_array_equal(other.objective, one.objective)
  clado, diagonal = (made(METHODS[m], again).took() for m in ("clado", "clado_diagonal"))
  assert clado == diagonal
  events = [e["method"] for e in Workdir(folder / "wide").events("measured") if e["seconds"] > 0]
  # The variants of CLADO share theirs.
  assert "clado_diagonal" not in events and "clado_block" not in events


def test_a_part_of_the_examples_is_measured(folder):
  whole = start_of(MAIN, folder / "a", names=NAMES[:2])
  half = len(whole.x) // 2
  few = Examples(whole.x[:half], whole.examples.labels[:half])
  part = dataclasses.replace(whole, examples=few)
  alone = start_of(MAIN, folder / "b", names=NAMES[:2], x=few.x, examples=few)
  for name in ("clado", "mpqco", "hawq"):
    one, two = (made(METHODS[name], start) for start in (part, alone))
    np.testing.assert_array_equal(one.objective, two.objective)
    assert one.took()["forwards"] == 0.5 * two.took()["forwards"]


def test_uniform_plan(folder):
  found = plan("uniform", start_of(MAIN, folder / "uniform"), 5.0)
  assert found.bits == dict.fromkeys(NAMES, 5)


def test_sizes_are_limited(folder):
  tensor = made(METHODS["mpqco"], start_of(SIZE, folder / "size"))
  params = {name: calibrated().network.layer(name).params for name in NAMES}
  for share in (0.25, 0.4, 1.0):
    (found,) = tensor.at(share)
    size = sum(params[n] * b / 8 for n, b in found.bits.items())
    assert size <= share * sum(params.values()) * (1 + 1e-9)
  (found,) = tensor.at(0.25)
  assert set(found.bits.values()) == {2}
  with pytest.raises(ValueError, match=r"size.*0\.25"):
    tensor.at(0.2)


# 8 bits and floating point.


def share_of(bits):
  """Share of the MACs in 8 bits."""
  return sum(macs()[n] for n, b in bits.items() if b == 8) / sum(macs().values())


@pytest.mark.parametrize("method", WITH_FLOAT)
def test_enough_is_in_8_bits(float8, method):
  one = made(METHODS[method], float8)
  for share in (0.0, 0.3, 0.7, 1.0):
    for found in one.at(share):
      assert set(found.bits) == set(NAMES) and set(found.bits.values()) <= {8, FLOAT}
      assert share_of(found.bits) >= share - 1e-9
      assert float8.average(found.bits) == pytest.approx(32 - 24 * share_of(found.bits))


@pytest.mark.parametrize("method", ["clado_diagonal", "mpqco", "hawq"])
def test_floating_point_does_no_harm(float8, method):
  one = made(METHODS[method], float8)
  harm, exact = one.objective.reshape(-1, 2).T
  assert (exact == 0).all() and np.ptp(harm) > 0
  # A trace of the Hessian is negative where random weights are no minimum of the loss.
  assert method == "hawq" or (harm > 0).all()
  plans = [dict(zip(NAMES, b, strict=True)) for b in itertools.product((8, FLOAT), repeat=3)]
  for share in (0.2, 0.5, 0.8):
    least = min(
      sum(h for h, b in zip(harm, plan.values(), strict=True) if b == 8)
      for plan in plans
      if share_of(plan) >= share
    )
    (found,) = one.at(share)
    assert sum(h for h, n in zip(harm, NAMES, strict=True) if found.bits[n] == 8) == (
      pytest.approx(least)
    )
