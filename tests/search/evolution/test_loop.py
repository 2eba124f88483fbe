"""The evolutionary search: what it promises of its result, its record and a second start."""

import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from flexiq_jax.orders import Schedule
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import SearchSettings, steps
from flexiq_jax.search.evolution.loop import evolve
from flexiq_jax.search.record import Record
from tests.search import networks_for_test
from tests.search.networks_for_test import Counted, greedy, made, plain

SETTINGS = SearchSettings(
  method="evolution", generations=6, population=10, elites=2, checkpoint_every=2
)


def run(fitness=None, settings=SETTINGS, seeds=None, **options):
  with Record(fitness or Counted(), method="evolution", seed=0, **options) as record:
    return evolve(record, made().scores, settings, [greedy()] if seeds is None else seeds)


def true(fitness, order, levels=SETTINGS.levels):
  return fitness(Schedule(made().space, order).stack(levels))


@pytest.mark.parametrize("halving", [False, True])
def test_progressive_search_of_the_network_is_never_worse_than_greedy(halving):
  fitness, space = networks_for_test.fitness(), made().space
  found = run(fitness, dataclasses.replace(SETTINGS, halving=halving))
  np.testing.assert_allclose([*found.fitness.values()], true(fitness, found.order), rtol=1e-6)
  assert found.fitness.keys() == {0.25, 0.5, 0.75}
  frozen = np.zeros(0, np.int64)
  for level in SETTINGS.levels:
    rest = greedy()[~np.isin(greedy(), frozen)]
    seed = np.concatenate([frozen, rest])  # greedy on top of what the level below found
    assert found.fitness[level] <= true(fitness, seed, [level])[0]
    frozen = found.order[: Schedule(space, found.order).prefix(level)]
  assert found.fitness[0.25] < 0.99 * true(fitness, greedy(), [0.25])[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("halving", [False, True])
def test_best_is_never_worse_than_any_given_order(seed, halving):
  settings = dataclasses.replace(SETTINGS, levels=(0.4,), halving=halving, generations=2)
  rng = np.random.default_rng(seed)
  seeds = [rng.permutation(made().space.total) for _ in range(3)]
  fitness = Counted()
  found = run(fitness, settings, seeds)
  assert found.fitness[0.4] <= min(true(fitness, order, [0.4])[0] for order in seeds)


def test_joint_search_is_never_worse_in_the_mean_of_relative_distances():
  fitness = networks_for_test.fitness()
  found = run(fitness, dataclasses.replace(SETTINGS, mode="joint"))
  relative = np.array([*found.fitness.values()]) / true(fitness, greedy())
  np.testing.assert_allclose([*found.fitness.values()], true(fitness, found.order), rtol=1e-6)
  assert relative.mean() < 0.99


def test_rows_tell_every_step(tmp_path):
  found = run(workdir=Workdir(tmp_path))
  rows = steps(Workdir(tmp_path), "evolution", 0)
  assert [row["ratio"] for row in rows] == [0.25] * 7 + [0.5] * 7 + [0.75] * 7
  assert [row["step"] for row in rows] == [*range(7)] * 3
  assert [row["stage"] for row in rows] == (["seeds"] + ["evolution"] * 6) * 3
  for name in ("forwards", "seconds"):
    assert (np.diff([row[name] for row in rows]) >= 0).all()
  assert rows[-1]["forwards"] <= found.forwards
  for level in SETTINGS.levels:
    best = [row["best"] for row in rows if row["ratio"] == level]
    assert (np.diff(best) <= 0).all()
    np.testing.assert_allclose(best[-1], found.fitness[level], rtol=1e-6)
  assert all(row["mean"] >= row["best"] for row in rows if row["step"] == 0)
  assert [row["differ"] is None for row in rows] == [row["step"] == 0 for row in rows]


def test_masks_are_evaluated_once():
  fitness = Counted()
  found = run(fitness)
  masks = np.concatenate([masks for masks, _ in fitness.calls])
  assert len(np.unique(masks, axis=0)) == len(masks) == found.forwards
  assert len(masks) < 3 * (10 + 6 * 8)  # so there were some to be spared


def test_patience_ends_a_level(tmp_path):
  short, long = Workdir(tmp_path / "short"), Workdir(tmp_path / "long")
  flat = Counted(of=lambda masks: np.ones((len(masks), 16), np.float32))
  run(flat, dataclasses.replace(SETTINGS, patience=2), workdir=short)
  assert [row["step"] for row in steps(short)] == [0, 1, 2] * 3
  run(settings=dataclasses.replace(SETTINGS, patience=2, generations=40), workdir=long)
  for level in SETTINGS.levels:
    best = np.array([row["best"] for row in steps(long) if row["ratio"] == level])
    waited = np.diff(np.append(np.flatnonzero(np.diff(best, prepend=np.inf) < 0), len(best)))
    assert (waited[:-1] <= 2).all()
    assert waited[-1] == 3 or len(best) == 41


def test_time_is_shared_by_the_levels(tmp_path):
  workdir, now = Workdir(tmp_path), iter(range(10**6))
  settings = dataclasses.replace(SETTINGS, generations=100)
  fitness = Counted()
  clock = lambda: 60.0 * next(now) / 10  # six seconds at each look
  found = run(fitness, settings, workdir=workdir, clock=clock, max_minutes=12)
  assert found.fitness.keys() == {0.25, 0.5, 0.75}
  rows = steps(workdir)
  ends = [max(r["seconds"] for r in rows if r["ratio"] == level) for level in settings.levels]
  np.testing.assert_allclose(ends, [240, 480, 720], atol=20)
  # A limit that is over at once still gives an order, from the seeds.
  found = run(fitness, settings, clock=clock, max_minutes=1e-6)
  assert found.fitness[0.25] <= true(fitness, greedy(), [0.25])[0]


def test_halving_spares_forwards():
  plain, halving = Counted(), Counted()
  run(plain)
  run(halving, dataclasses.replace(SETTINGS, halving=True))
  assert halving.forwards < 0.75 * plain.forwards


@pytest.mark.parametrize(
  ("mode", "halving"), [("progressive", False), ("progressive", True), ("joint", False)]
)
def test_nan_never_wins(mode, halving, tmp_path):
  bad = made().space.index("down", 2)

  def of(masks):
    values = np.repeat(1.0 + masks.sum(axis=1, keepdims=True), 16, axis=1).astype(np.float32)
    values[masks[:, bad], 3:] = np.nan
    return values

  settings = dataclasses.replace(SETTINGS, halving=halving, mode=mode)
  order = np.concatenate([[bad], np.delete(np.arange(18), bad)])  # NaN at every level
  found = run(Counted(of), settings, [order], workdir=Workdir(tmp_path))
  assert np.isfinite([*found.fitness.values()]).all()
  assert len(steps(Workdir(tmp_path))) == (7 if mode == "joint" else 21)


@pytest.mark.parametrize("mode", ["progressive", "joint"])
def test_nothing_but_nan_is_still_an_order(mode, tmp_path):
  nothing = Counted(of=lambda masks: np.full((len(masks), 16), np.nan, np.float32))
  workdir, lines = Workdir(tmp_path), []
  settings = dataclasses.replace(SETTINGS, mode=mode)
  found = run(nothing, settings, workdir=workdir, show=lines.append)
  assert np.isnan([*found.fitness.values()]).all()
  assert sorted(found.order) == [*range(18)]
  assert steps(workdir) == []
  assert any("best distance inf" in line for line in lines)


def test_same_seed_same_search():
  one, two = run(), run()
  np.testing.assert_array_equal(one.order, two.order)
  assert one.fitness == two.fitness
  with Record(Counted(), method="evolution", seed=1) as record:
    other = evolve(record, made().scores, SETTINGS, [greedy()])
  assert not np.array_equal(one.order, other.order)


class Stop(Exception):
  pass


@pytest.mark.parametrize(
  ("options", "stops"),
  [
    ({}, (11,)),
    ({"halving": True, "patience": 3}, (14,)),
    ({"mode": "joint"}, (5,)),
  ],
  ids=str,
)
def test_stopped_search_goes_on_as_if_nothing_had_happened(options, stops, tmp_path):
  settings = dataclasses.replace(SETTINGS, **options)

  def start(folder, stop=None):
    workdir, count = Workdir(folder), []

    def show(line):
      count.append(line)
      if len(count) == stop:
        raise Stop

    found = run(Counted(), settings, made_from={"a": (1, 2)}, workdir=workdir, show=show)
    return found, plain(steps(workdir)), len(count)

  whole, rows, shown = start(tmp_path / "whole")
  for stop in stops:
    folder = tmp_path / f"stopped{stop}"
    with pytest.raises(Stop):
      start(folder, stop)
    found, same, left = start(folder)
    assert left < shown  # it did not begin anew
    np.testing.assert_array_equal(found.order, whole.order)
    assert found.fitness == whole.fitness
    assert found.forwards == whole.forwards
    assert same == rows


_SEARCH = """
import pickle, sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from flexiq_jax.runs.workdir import Workdir
from tests.search import networks_for_test
from tests.search.evolution import test_loop
made = pickle.loads(Path(sys.argv[2]).read_bytes())
test_loop.made = networks_for_test.made = lambda: made
test_loop.run(workdir=Workdir(sys.argv[1]), show=lambda line: print(line, flush=True))
"""


def test_killed_search_goes_on(tmp_path):
  root = pathlib.Path(__file__).parents[3]
  # What is searched, so that the other process need not calibrate a network.
  given = tmp_path / "given"
  given.write_bytes(pickle.dumps(types.SimpleNamespace(space=made().space, scores=made().scores)))
  command = (sys.executable, "-c", _SEARCH, str(tmp_path), str(given))
  environment = {**os.environ, "PYTHONPATH": str(root)}
  with subprocess.Popen(
    command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if "50 %, evolution 5" in line:
        process.kill()
  assert process.returncode == -9
  workdir, whole, lines = Workdir(tmp_path), Workdir(tmp_path / "whole"), []
  found = run(workdir=workdir, show=lines.append)
  expected = run(workdir=whole)
  assert "50 %, evolution 5" in lines[0]  # after the checkpoint of generation 4
  np.testing.assert_array_equal(found.order, expected.order)
  assert plain(steps(workdir)) == plain(steps(whole))
