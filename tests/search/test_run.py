"""One call for every method, from settings to an order."""

import dataclasses

import numpy as np
import pytest

from flexiq_jax.flexiq import improve
from flexiq_jax.orders import Schedule
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import SearchSettings, search, steps
from tests.search import networks_for_test
from tests.search.networks_for_test import greedy, made, plain

SMALL = SearchSettings(
  levels=(0.3, 0.6), generations=3, population=10, elites=2, candidates=2, checkpoint_every=2
)


def run(settings, examples=None, **options):
  m = made()
  examples = m.images if examples is None else examples
  return search(m.network, m.model, m.space, m.scores, examples, settings, **options)


def true(order, levels=SMALL.levels):
  return networks_for_test.fitness()(Schedule(made().space, order).stack(levels))


class Stop(Exception):
  pass


def test_greedy_is_no_search(tmp_path):
  settings = dataclasses.replace(SMALL, method="greedy")
  for _ in range(2):  # the second start adds no rows
    found = run(settings, workdir=tmp_path / "new", seed=7)
    np.testing.assert_array_equal(found.order, greedy())
    np.testing.assert_allclose([*found.fitness.values()], true(greedy()), rtol=1e-5)
    assert found.forwards == 2
    rows = steps(Workdir(tmp_path / "new"), "greedy", 7)
    assert [row["ratio"] for row in rows] == [0.3, 0.6]
    np.testing.assert_allclose([row["best"] for row in rows], true(greedy()), rtol=1e-5)


def test_evolution_is_kept_and_not_done_twice(tmp_path):
  settings = dataclasses.replace(SMALL, method="evolution")
  workdir = Workdir(tmp_path)
  found = run(settings, workdir=workdir, made_from={"model": "tiny"})
  np.testing.assert_allclose([*found.fitness.values()], true(found.order), rtol=1e-5)
  assert found.fitness[0.3] <= true(greedy())[0] * (1 + 1e-6)
  rows = steps(workdir, "evolution", 0)
  assert [row["step"] for row in rows] == [0, 1, 2, 3] * 2
  lines = []
  again = run(settings, workdir=tmp_path, made_from={"model": "tiny"}, show=lines.append)
  np.testing.assert_array_equal(again.order, found.order)
  assert (again.fitness, again.forwards) == (found.fitness, found.forwards)
  assert len(lines) == 1  # the generation after the last checkpoint
  assert plain(steps(workdir, "evolution", 0)) == plain(rows)
  with pytest.raises(ValueError, match=r"made for another model, data or search settings; remove"):
    run(settings, workdir=tmp_path, made_from={"model": "another"})
  wider = dataclasses.replace(settings, population=11)
  with pytest.raises(ValueError, match=r"made with other settings: remove .*evolution or name"):
    run(wider, workdir=tmp_path, made_from={"model": "tiny"})


def test_gram_search_is_polished_and_goes_on(tmp_path):
  settings = dataclasses.replace(SMALL, polish=3, images=12)
  lines = []

  def start(folder, stop=None):
    lines.clear()

    def show(line):
      lines.append(line)
      if len(lines) == stop:
        raise Stop

    found = run(settings, workdir=folder, show=show, seed=2)
    log = Workdir(folder)
    return found, plain(steps(log, "gram", 2)), plain(steps(log, "gram+evolution", 2))

  found, measured, polished = start(tmp_path / "whole")
  assert [row["step"] for row in polished] == [0, 1, 2, 3] * 2
  assert polished[0]["forwards"] >= measured[-1]["forwards"]
  for level in SMALL.levels:
    at = [[r["best"] for r in rows if r["ratio"] == level] for rows in (measured, polished)]
    assert at[1][-1] == pytest.approx(found.fitness[level], rel=1e-6)
  assert polished[0]["best"] <= measured[0]["best"] * (1 + 1e-6)
  # The last four examples took no part.
  m = made()
  expected = [
    m.distances(mask)[:12].mean() for mask in Schedule(m.space, found.order).stack([0.3, 0.6])
  ]
  np.testing.assert_allclose([*found.fitness.values()], expected, rtol=1e-5)

  count = len(lines)
  with pytest.raises(Stop):
    start(tmp_path / "stopped", count - 1)
  again, *rows = start(tmp_path / "stopped")
  # Neither the Gram matrix nor the first generations are done again.
  assert len(lines) < count - 3
  assert all(line.startswith("gram+evolution") for line in lines)
  np.testing.assert_array_equal(again.order, found.order)
  assert (again.fitness, again.forwards) == (found.fitness, found.forwards)
  assert rows == [measured, polished]


def test_improved_model_runs_in_the_order_that_was_found():
  m = made()
  model = m.grouped.ordered(greedy())
  better = improve(model, m.images, settings=SMALL, progress=False)
  for level in SMALL.levels:
    before, after = (m.distances(x.schedule.mask(level)).mean() for x in (model, better))
    assert after <= before * (1 + 1e-6)
  found = run(SMALL)  # scores are the same, those of the errors on the same images
  np.testing.assert_array_equal(better.schedule.order, found.order)
  assert better.model is model.model


def test_wrong_scores_are_refused():
  m = made()
  with pytest.raises(ValueError, match=r"scores: shape \(3,\), expected \(18,\)"):
    search(m.network, m.model, m.space, m.scores[:3], m.images, SMALL)


def test_one_example_shows_no_variance():
  with pytest.raises(ValueError, match="examples: 1; a Gram matrix is measured on at least 2"):
    run(SMALL, made().images[:1])
