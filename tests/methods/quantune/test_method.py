"""QuantuneV2's plans fill their budgets, and say what they come from."""

import json

import pytest

from flexiq_jax.methods import fusion
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.quantune import Quantune
from tests.methods.starts_for_test import FLOAT8, MAIN, NAMES, macs, made, start_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("quantune")


@pytest.fixture(scope="module")
def main(folder):
  return made(Quantune, start_of(MAIN, folder / "main"))


@pytest.fixture(scope="module")
def float8(folder):
  return made(Quantune, start_of(FLOAT8, folder / "float8"))


def test_quantune_fills_the_budget(main):
  total = sum(macs().values())
  for budget in (4.0, 5.0, 6.5, 8.0):
    (plan,) = main.at(budget)
    left = (budget - main.start.average(plan.bits)) * total + 1e-6
    assert left >= 0
    assert all(4 * macs()[n] > left for n, b in plan.bits.items() if b == 4)
  assert main.took()["forwards"] == 2


def test_layers_that_are_always_float_are_so_in_the_second_run(main, float8):
  """What comes before the first selectable layer is exact; with 8 bits it is not."""
  for method, exact in ((float8, True), (main, False)):
    runs = method.runs
    first = next(i for i, o in enumerate(runs.operations) if o.layer == NAMES[0])
    assert (runs.error[:first] == 0).all() == exact
    assert runs.error[first] > 0
  best = float8.forms(0.5)[0]
  layers = [n.layer for n in fusion.nodes(float8.runs.operations, best.grouping)]
  assert [b for b, n in zip(best.node_bits, layers, strict=True) if n == "stem"] == [FLOAT]


def test_file_holds_each_budget_once(main):
  for budget in (6.0, 5.0, 6.0):
    main.at(budget)
  kept = json.loads((main.start.folder / "quantune.json").read_text())
  assert kept["pair"] == [4, 8] and [*kept["lists"]] == [*fusion.GROUPINGS]
  budgets = [plan["budget"] for plan in kept["plans"] if plan["chosen"]]
  assert budgets == sorted(set(budgets)) and {5.0, 6.0} <= set(budgets)
  assert len(kept["plans"]) == len(fusion.GROUPINGS) * len(budgets)
