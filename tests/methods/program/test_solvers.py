"""Every solver against all choices tried one by one; limits, ties, bounds, refusals."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from flexiq_jax.methods.program import SOLVERS, Choices, Problem, chains, highs, solve
from flexiq_jax.methods.program.blocks import Blocks
from tests.methods.program.programs_for_test import (
  everything,
  least,
  looser,
  problems,
  random_problem,
  within,
)

EXACT = ["enumerate_all", "milp"]
ALL = [*EXACT, "local_search", "auto"]


def checked(problem, plan):
  """The plan, after a look at everything that it says about itself."""
  bits, value, costs = next(e for e in everything(problem) if e[0] == plan.bits)
  assert list(plan.bits) == list(problem.choices.names)
  assert plan.objective == pytest.approx(value, rel=1e-9, abs=1e-9)
  assert plan.objective == pytest.approx(problem.value(bits), rel=1e-12)
  assert plan.costs == pytest.approx(costs)
  assert within(costs, problem.limits)
  assert plan.seconds >= 0
  return plan


@pytest.mark.parametrize("solver", ALL)
@given(problem=problems)
@settings(max_examples=20, deadline=None)
def test_finds_the_least_objective(solver, problem):
  plan, best = checked(problem, solve(problem, solver)), least(problem)
  assert plan.objective == pytest.approx(best, rel=1e-6, abs=1e-6)
  if plan.bound is not None:
    assert plan.bound <= best + 1e-9 * max(1, abs(best))
    assert plan.bound <= plan.objective
  if solver != "local_search":
    assert plan.optimal


@pytest.mark.parametrize("kind", ["psd", "indefinite"])
@pytest.mark.parametrize("solver", ["milp", "local_search"])
def test_agrees_with_enumeration_on_ten_layers(kind, solver):
  problem = random_problem(5, kind, layers=10, limits=2, tied=True)
  exact = solve(problem, "enumerate_all")
  assert exact.objective == pytest.approx(least(problem))
  assert checked(problem, solve(problem, solver)).objective == pytest.approx(exact.objective)


@pytest.mark.parametrize("solver", EXACT)
@given(problem=problems)
@settings(max_examples=10, deadline=None)
def test_more_budget_is_never_worse(solver, problem):
  tight, loose = (solve(p, solver) for p in (problem, looser(problem, 1.2)))
  assert loose.objective <= tight.objective + 1e-6 * max(1, abs(tight.objective))


# Bounds.


@pytest.mark.parametrize("seed", range(3))
def test_bound_of_the_relaxation_is_that_of_a_dense_grid(seed):
  """Two layers of two options: fractions (a, b) of the first ones on a grid."""
  rng = np.random.default_rng(seed)
  effects = rng.normal(size=(4, 2))
  choices = Choices.create(["a", "b"], (4, 8), {"size": [(4, 8), (4, 8)]})
  gram = effects @ effects.T
  plan = solve(Problem(choices=choices, objective=gram, limits={"size": 13}), "local_search")
  a, b = np.meshgrid(np.linspace(0, 1, 801), np.linspace(0, 1, 801))
  z = np.stack([a, 1 - a, b, 1 - b], axis=-1)
  values = ((z @ gram) * z).sum(axis=-1)[4 * (a + b) + 8 * (2 - a - b) <= 13 + 1e-9]
  assert plan.bound <= values.min() + 1e-9
  assert plan.bound == pytest.approx(values.min(), rel=2e-3, abs=2e-3)


def test_bound_is_close_where_interactions_are_weak():
  problem = random_problem(0, "linear", layers=8)
  c = np.abs(problem.objective)
  linear, alone = (
    solve(dataclasses.replace(problem, objective=g), "local_search") for g in (c, np.diag(c))
  )
  assert alone.objective == pytest.approx(linear.objective)
  assert alone.bound == pytest.approx(linear.bound, rel=2e-3)
  weak = np.diag(c) + 1e-3 * np.sqrt(np.outer(c, c))
  plan = solve(dataclasses.replace(problem, objective=weak), "local_search")
  assert plan.bound == pytest.approx(alone.bound, rel=0.03)


def test_local_search_bounds_convex_and_linear_programs_only():
  def bounds(kind):
    return [solve(random_problem(s, kind), "local_search").bound for s in range(5)]

  assert all(b is not None for b in [*bounds("psd"), *bounds("linear")])
  plans = [solve(random_problem(s, "indefinite"), "local_search") for s in range(5)]
  assert all(p.bound is None and p.gap is None and not p.optimal for p in plans)


def test_milp_out_of_time_claims_no_more_than_it_proved():
  problem = random_problem(0, "psd", layers=30)
  better = solve(problem, "local_search", time_limit=20)
  try:
    plan = solve(problem, "milp", time_limit=2)
  except TimeoutError as error:
    assert "local_search" in str(error)
  else:
    assert plan.bound is None or plan.bound <= better.objective + 1e-9
    assert within(plan.costs, problem.limits)


def test_auto_keeps_the_best_plan_and_the_best_bound():
  problem = random_problem(1, "psd", layers=16, limits=2)  # too many choices to try all
  auto = solve(problem, time_limit=8)
  alone = solve(problem, "local_search")
  assert auto.solver == "local_search+milp"
  assert auto.objective <= alone.objective + 1e-12
  assert auto.bound >= alone.bound - 1e-3 * abs(alone.objective)
  assert auto.bound <= auto.objective


def test_local_search_repeats_with_its_seed():
  problem = random_problem(3, "indefinite", layers=12)
  first, second = (solve(problem, "local_search", seed=4) for _ in range(2))
  assert first.bits == second.bits


@pytest.mark.parametrize("kind", ["linear", "psd", "indefinite"])
@pytest.mark.parametrize("seed", range(6))
def test_polished_plans_cannot_be_improved_by_changing_two_layers(seed, kind):
  """Without time to anneal, what is left of local_search is the descent."""
  problem = random_problem(seed, kind, layers=12, limits=2, tied=True)
  blocks = Blocks.create(problem)
  taken = chains.search(blocks, highs.cheapest(blocks), seed=0, time_limit=0)
  value = blocks.value(taken)
  for a, b in itertools.product(range(len(blocks.linear)), repeat=2):
    other = taken.copy()
    other[blocks.block[a]] = a
    other[blocks.block[b]] = b
    assert not blocks.meets(other) or blocks.value(other) >= value - 1e-9 * max(1, abs(value))


# Limits.


@pytest.mark.parametrize("solver", ALL)
def test_limits_no_one_can_meet_are_refused(solver):
  problem = random_problem(0, "psd")
  smallest = min(costs["size"] for _, _, costs in everything(problem))
  strict = dataclasses.replace(problem, limits={"size": smallest - 1})
  message = rf"no choice of bits has size <= {smallest - 1:.12g}; the smallest is {smallest:.12g}"
  with pytest.raises(ValueError, match=message):
    solve(strict, solver)
  plan = solve(dataclasses.replace(problem, limits={"size": smallest}), solver)
  assert plan.costs["size"] == smallest


@pytest.mark.parametrize("solver", ALL)
def test_limits_that_exclude_each_other_are_refused(solver):
  choices = Choices.create(["a", "b"], (4, 8), {"size": [(4, 8)] * 2, "time": [(3, 1)] * 2})
  problem = Problem(choices=choices, objective=np.eye(4), limits={"size": 12, "time": 3})
  with pytest.raises(ValueError, match=r"time <= 3; the smallest with size <= 12 is 4"):
    solve(problem, solver)
  plan = solve(dataclasses.replace(problem, limits={"size": 12, "time": 4}), solver)
  assert plan.costs == {"size": 12, "time": 4}


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("whole", [True, False])
def test_a_limit_missed_by_one_part_in_ten_million_is_missed(solver, whole):
  """Within the tolerances of HiGHS, and yet not met."""
  unit = 1 if whole else 1 / 3
  size = np.array([(4.0, 10_000_001.0), (4.0, 10_000_000.0), (4.0, 9_999_999.0)]) * unit
  choices = Choices.create("abc", (4, 8), {"size": size})
  objective = np.array([0, -3, 0, -2, 0, -1.0])
  limit = 10_000_000 * unit + 8 * unit
  plan = solve(Problem(choices=choices, objective=objective, limits={"size": limit}), solver)
  assert plan.bits == {"a": 4, "b": 8, "c": 4}


@pytest.mark.parametrize("solver", ALL)
def test_a_limit_that_is_the_sum_of_all_costs_allows_all(solver):
  time = np.random.default_rng(0).random((9, 2)).cumsum(axis=1)
  choices = Choices.create("abcdefghi", (4, 8), {"time": time})
  objective = np.tile([1.0, 0.0], 9)
  problem = Problem(choices=choices, objective=objective, limits={"time": sum(time[::-1, 1])})
  assert solve(problem, solver).bits == choices.uniform(max)


# Refusals.


def test_enumeration_refuses_what_takes_too_long():
  choices = Choices.create([f"l{i}" for i in range(15)], (2, 4, 8), {})
  with pytest.raises(ValueError, match="14348907 combinations"):
    solve(Problem(choices=choices, objective=np.zeros(45)), "enumerate_all")


def test_unknown_solvers_are_refused():
  with pytest.raises(ValueError, match="solver: 'gurobi'; expected 'auto' or one of"):
    solve(random_problem(0, "psd"), "gurobi")


def test_registry_names_the_functions():
  assert set(SOLVERS) == {"enumerate_all", "milp", "local_search"}
