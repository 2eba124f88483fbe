"""Random plans fill their budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.methods.random_plans import Random
from tests.methods.starts_for_test import WIDE, macs, made, start_of


@pytest.fixture(scope="module")
def random(tmp_path_factory):
  return made(Random, start_of(WIDE, tmp_path_factory.mktemp("random")), random_plans=3)


@given(budget=st.floats(2, 8), number=st.integers(0, 5))
def test_random_plans_fill_the_budget(random, budget, number):
  plan = random.draw(budget, number)
  assert plan == random.draw(budget, number)
  left = (budget - random.start.average(plan.bits)) * sum(macs().values()) + 1e-6
  assert left >= 0
  widths = (2, 4, 8)
  for name, b in plan.bits.items():
    if b < 8:
      assert (widths[widths.index(b) + 1] - b) * macs()[name] > left - 1e-3


def test_as_many_as_were_asked_for(random):
  assert random.at(5.0) == [random.draw(5.0, number) for number in range(3)]
