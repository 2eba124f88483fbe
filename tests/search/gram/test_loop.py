"""The search on a Gram matrix: its result is checked by the model, its record by a second start."""

import dataclasses

import numpy as np
import pytest

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import SearchSettings, steps
from flexiq_jax.search.gram.loop import gram_search
from flexiq_jax.search.gram.surrogate import Quadratic
from flexiq_jax.search.gram.ties import Ties
from flexiq_jax.search.record import Record
from tests.search import networks_for_test
from tests.search.networks_for_test import greedy, influence, made, plain

SETTINGS = SearchSettings(levels=(0.25, 0.5, 0.75), candidates=4, rounds=2)


def run(measured=None, settings=SETTINGS, order=None, **options):
  measured = measured or influence()
  fitness = getattr(measured, "fitness", None) or networks_for_test.fitness()
  fitness.forwards = 0.0
  with Record(fitness, method="gram", seed=0, **options) as record:
    return gram_search(record, measured, settings, [greedy() if order is None else order])


def true(order, levels=SETTINGS.levels):
  return networks_for_test.fitness()(Schedule(made().space, order).stack(levels))


@pytest.mark.parametrize("rounds", [0, 2])
def test_search_of_the_network_is_never_worse_than_greedy(rounds, tmp_path):
  workdir, space = Workdir(tmp_path), made().space
  found = run(settings=dataclasses.replace(SETTINGS, rounds=rounds), workdir=workdir)
  np.testing.assert_allclose([*found.fitness.values()], true(found.order), rtol=1e-6)
  frozen = np.zeros(0, np.int64)
  for level, fitness in found.fitness.items():
    seed = np.concatenate([frozen, greedy()[~np.isin(greedy(), frozen)]])
    assert fitness <= true(seed, [level])[0]
    frozen = found.order[: Schedule(space, found.order).prefix(level)]
  assert found.fitness[0.25] < 0.99 * true(greedy(), [0.25])[0]
  rows = steps(workdir, "gram", 0)
  for level in SETTINGS.levels:
    own = [row for row in rows if row["ratio"] == level]
    assert [row["step"] for row in own] == [*range(len(own))]
    assert 1 <= len(own) <= rounds + 1
    assert (np.diff([row["best"] for row in own]) <= 0).all()
    assert own[-1]["best"] == pytest.approx(found.fitness[level], rel=1e-9)
  assert (np.diff([row["forwards"] for row in rows]) > 0).all()
  if rounds == 0:  # three for each logit, and at each level six masks at most
    assert 15 < found.forwards <= 15 + 3 * 6


class Stop(Exception):
  pass


@pytest.mark.parametrize("options", [{}, {"limit": 10}], ids=str)
def test_stopped_search_goes_on_as_if_nothing_had_happened(options, tmp_path):
  measured = influence(**options)

  def start(folder, stop=None):
    workdir, lines = Workdir(folder), []

    def show(line):
      if line.endswith("% of the examples"):
        return  # comes by the clock, on a slow machine alone
      lines.append(line)
      if len(lines) == stop:
        raise Stop

    found = run(measured, workdir=workdir, show=show, made_from={"a": (1,)})
    return found, plain(steps(workdir)), lines

  whole, rows, lines = start(tmp_path / "whole")
  assert len(lines) == len(rows) + 1  # and what a measurement costs
  for stop in range(3, len(lines) + 1, 2):
    folder = tmp_path / f"stopped{stop}"
    with pytest.raises(Stop):
      start(folder, stop)
    found, same, left = start(folder)
    assert len(left) == len(lines) - stop + 1
    np.testing.assert_array_equal(found.order, whole.order)
    assert (found.fitness, found.forwards) == (whole.fitness, whole.forwards)
    assert same == rows
  # One that had ended has nothing left to do.
  found, same, left = start(tmp_path / "whole")
  assert (found.fitness, found.forwards, same, left) == (whole.fitness, whole.forwards, rows, [])


def test_ties_give_an_order_of_groups():
  measured = influence(limit=10)
  assert measured.ties.size == 2
  found = run(measured)
  assert sorted(found.order) == [*range(18)]
  np.testing.assert_allclose([*found.fitness.values()], true(found.order), rtol=1e-6)
  # A tie's groups follow each other.
  tied = measured.ties.of[found.order]
  assert np.sum(np.diff(tied) != 0) == measured.ties.space.total - 1


class Formula:
  """A fitness and its measurement for given effects `[n, K, T]` on logits, exact and additive."""

  def __init__(self, effects, of=None, cost=None):
    total = effects.shape[2]
    self.space = Space.create(["a"], [[1] * total], [1])
    self.fitness, self.ties = self, Ties(self.space, np.ones(total), 100)
    self.forwards, self.measured, self._effects, self._of = 0.0, [], effects, of

  def __call__(self, masks, part=(0.0, 1.0)):
    self.forwards += len(masks)
    if self._of:
      return self._of(masks)
    return np.square(self._effects @ masks.T).sum(axis=1).mean(axis=0)

  def describe(self):
    return ""

  def measure(self, key, base, report=None):
    self.measured.append(base.copy())
    d = self._effects * np.where(base, -1.0, 1.0)
    r = self._effects @ base
    quadratic = Quadratic(
      base=base,
      value=float(np.square(r).sum(axis=1).mean()),
      gradient=np.einsum("bkt,bk->t", d, r) / len(d),
      gram=np.einsum("bkt,bku->tu", d, d) / len(d),
    )
    return quadratic, 0.0


def test_effects_that_cancel_are_found():
  """Twelve groups: six small ones that add up, and three pairs of larger ones that cancel."""
  effects = np.zeros((4, 2, 12))
  effects[:, 0, :6] = 1.0
  effects[:, 1, 6::2], effects[:, 1, 7::2] = 3.0, -3.0
  problem = Formula(effects)
  settings = SearchSettings(levels=(0.5,), candidates=2)
  greedy_order = np.argsort(np.square(effects).sum(axis=(0, 1)), kind="stable")
  worst = problem(Schedule(problem.space, greedy_order).stack([0.5]))[0]
  assert worst == 36
  found = run(problem, settings, greedy_order)
  assert found.fitness[0.5] == 0
  assert set(found.order[:6]) == set(range(6, 12))


@pytest.mark.parametrize("bad", [True, False], ids=["all", "some"])
def test_nan_never_wins(bad, tmp_path):
  """Where all masks give NaN the search goes on with the model's choice."""
  effects = np.random.default_rng(0).normal(size=(4, 3, 12))
  plain = Formula(effects)
  of = lambda masks: np.where(bad | masks[:, 3], np.nan, plain(masks))
  problem = Formula(effects, of)
  workdir, lines = Workdir(tmp_path), []
  settings = SearchSettings(levels=(0.25, 0.5), rounds=1)
  order = np.argsort(np.arange(12) != 3, kind="stable")  # the group that breaks goes first
  found = run(problem, settings, order, workdir=workdir, show=lines.append)
  assert sorted(found.order) == [*range(12)]
  if bad:
    assert np.isnan([*found.fitness.values()]).all()
    assert [base.any() for base in problem.measured] == [False]  # never around such a mask
    assert steps(workdir) == []
    assert sum("best distance inf" in line for line in lines) == 2
  else:
    assert np.isfinite([*found.fitness.values()]).all()
    assert len(steps(workdir)) >= 3


def test_a_limit_of_time_ends_the_rounds(tmp_path):
  settings = dataclasses.replace(SETTINGS, rounds=20)
  found = run(settings=settings, workdir=Workdir(tmp_path), max_forwards=1)
  assert [row["step"] for row in steps(Workdir(tmp_path))] == [0, 0, 0]
  np.testing.assert_allclose([*found.fitness.values()], true(found.order), rtol=1e-6)


def test_same_seed_same_search():
  one, two = run(), run()
  np.testing.assert_array_equal(one.order, two.order)
  assert one.fitness == two.fitness
  assert one.forwards == two.forwards
