"""The evolutionary search: what it promises of its result, its record and a second start."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from flexiq_jax.orders import Schedule
from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.search import SearchLog, SearchSettings, Track
from flexiq_jax.search.evolution.loop import Archive, evolve, halved
from tests.search import networks_for_test
from tests.search.networks_for_test import greedy, made

SETTINGS = SearchSettings(
  method="evolution", generations=6, population=10, elites=2, checkpoint_every=2
)


class Counted:
  """A fitness by formula, of blocks of two images each; keeps what it was asked."""

  def __init__(self, of=None, blocks=8):
    self.space, self.images = made().space, 2 * blocks
    self.blocks, self.forwards, self.calls = blocks, 0.0, []
    # Effects of single images differ, and some pairs of groups cancel each other.
    rng = np.random.default_rng(0)
    self._effects = rng.normal(size=(self.images, 3, self.space.total))
    self._of = of

  def per_image(self, masks, part=(0.0, 1.0)):
    first, last = (round(share * self.images) for share in part)
    self.calls.append((masks.copy(), part))
    self.forwards += len(masks) * (part[1] - part[0])
    if self._of:
      return self._of(masks)[:, first:last]
    return np.square(masks @ self._effects[first:last].mT).sum(axis=-1).T.astype(np.float32)

  def __call__(self, masks, part=(0.0, 1.0)):
    return self.per_image(masks, part).mean(axis=1, dtype=np.float64)


def run(fitness=None, settings=SETTINGS, seeds=None, **options):
  track = Track(fitness or Counted(), method="evolution", seed=0, **options)
  with track:
    return evolve(track, made().scores, settings, [greedy()] if seeds is None else seeds)


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
  log = SearchLog(tmp_path / "search.csv")
  found = run(log=log)
  rows = log.rows("evolution", 0)
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
  log = SearchLog(tmp_path / "search.csv")
  flat = Counted(of=lambda masks: np.ones((len(masks), 16), np.float32))
  run(flat, dataclasses.replace(SETTINGS, patience=2), log=log)
  assert [row["step"] for row in log.rows()] == [0, 1, 2] * 3
  log.cut("evolution", 0, 0)
  run(settings=dataclasses.replace(SETTINGS, patience=2, generations=40), log=log)
  for level in SETTINGS.levels:
    best = np.array([row["best"] for row in log.rows() if row["ratio"] == level])
    waited = np.diff(np.append(np.flatnonzero(np.diff(best, prepend=np.inf) < 0), len(best)))
    assert (waited[:-1] <= 2).all()
    assert waited[-1] == 3 or len(best) == 41


def test_time_is_shared_by_the_levels(tmp_path):
  log, now = SearchLog(tmp_path / "search.csv"), iter(range(10**6))
  settings = dataclasses.replace(SETTINGS, generations=100)
  fitness = Counted()
  clock = lambda: 60.0 * next(now) / 10  # six seconds at each look
  found = run(fitness, settings, log=log, clock=clock, max_minutes=12)
  assert found.fitness.keys() == {0.25, 0.5, 0.75}
  ends = [max(r["seconds"] for r in log.rows() if r["ratio"] == level) for level in settings.levels]
  np.testing.assert_allclose(ends, [240, 480, 720], atol=20)
  # A limit that is over at once still gives an order, from the seeds.
  found = run(fitness, settings, clock=clock, max_minutes=1e-6)
  assert found.fitness[0.25] <= true(fitness, greedy(), [0.25])[0]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 8])
def test_halving_is_exact_for_those_that_stay(blocks):
  fitness = Counted(blocks=blocks)
  masks = made().random_masks(13)[1:]
  values, stayed = halved(fitness, masks)
  spent = fitness.forwards
  exact = fitness(masks)
  np.testing.assert_array_equal(values[stayed], exact[stayed])
  assert values[stayed].max() < values[~stayed].min(initial=np.inf)
  assert stayed.sum() == {1: 12, 2: 6}.get(blocks, 3)
  # In float32, too, which is what a population's fitness is kept in.
  low = values.astype(np.float32)
  assert low[stayed].max() < low[~stayed].min(initial=np.inf)
  if blocks % 4 == 0:
    assert spent == pytest.approx(12 / 4 + 6 / 4 + 3 / 2)
  else:
    assert spent <= 12


def test_halving_spares_forwards():
  plain, halving = Counted(), Counted()
  run(plain)
  run(halving, dataclasses.replace(SETTINGS, halving=True))
  assert halving.forwards < 0.75 * plain.forwards


def test_archive_keeps_estimates_apart():
  fitness = Counted()
  archive, masks = Archive(fitness, halving=True), made().random_masks(9)[1:]
  rough, exact = archive(masks), Counted()(masks)
  np.testing.assert_array_equal(archive(masks), rough)
  assert not np.array_equal(rough, exact)
  again = Archive(fitness, halving=True)
  again.load(json.loads(json.dumps(archive.dump())))
  before = fitness.forwards
  np.testing.assert_array_equal(again(masks), rough)
  assert fitness.forwards == before
  # What is known on all images is not evaluated again, and takes the estimate's place.
  np.testing.assert_array_equal(again(masks, full=True), exact)
  assert fitness.forwards == before + 6
  np.testing.assert_array_equal(again(masks), exact)
  assert fitness.forwards == before + 6


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
  log = SearchLog(tmp_path / "search.csv")
  found = run(Counted(of), settings, [order], log=log)
  assert np.isfinite([*found.fitness.values()]).all()
  assert len(log.rows()) == (7 if mode == "joint" else 21)


@pytest.mark.parametrize("mode", ["progressive", "joint"])
def test_nothing_but_nan_is_still_an_order(mode, tmp_path):
  nothing = Counted(of=lambda masks: np.full((len(masks), 16), np.nan, np.float32))
  log, lines = SearchLog(tmp_path / "search.csv"), []
  settings = dataclasses.replace(SETTINGS, mode=mode)
  found = run(nothing, settings, log=log, show=lines.append)
  assert np.isnan([*found.fitness.values()]).all()
  assert sorted(found.order) == [*range(18)]
  assert log.rows() == []
  assert any("best inf" in line for line in lines)


def test_same_seed_same_search():
  one, two = run(), run()
  np.testing.assert_array_equal(one.order, two.order)
  assert one.fitness == two.fitness
  with Track(Counted(), method="evolution", seed=1) as track:
    other = evolve(track, made().scores, SETTINGS, [greedy()])
  assert not np.array_equal(one.order, other.order)


class Stop(Exception):
  pass


def plain(rows):
  return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


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
    folder.mkdir(exist_ok=True)
    log, count = SearchLog(folder / "search.csv"), []

    def show(line):
      count.append(line)
      if len(count) == stop:
        raise Stop

    fitness = Counted()
    options = {"log": log, "checkpoints": Checkpoints(folder / "states"), "show": show}
    return run(fitness, settings, made_from={"a": (1, 2)}, **options), log, len(count)

  whole, log, steps = start(tmp_path / "whole")
  for stop in stops:
    folder = tmp_path / f"stopped{stop}"
    with pytest.raises(Stop):
      start(folder, stop)
    found, other, left = start(folder)
    assert left < steps  # it did not begin anew
    np.testing.assert_array_equal(found.order, whole.order)
    assert found.fitness == whole.fitness
    assert found.forwards == whole.forwards
    assert plain(other.rows()) == plain(log.rows())


_SEARCH = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.search import SearchLog
from tests.search import test_evolve
folder = Path(sys.argv[1])
log, checkpoints = SearchLog(folder / "search.csv"), Checkpoints(folder / "states")
show = lambda line: print(line, flush=True)
test_evolve.run(log=log, checkpoints=checkpoints, show=show)
"""


def test_killed_search_goes_on(tmp_path):
  root = pathlib.Path(__file__).parent.parent.parent.parent
  command = (sys.executable, "-c", _SEARCH, str(tmp_path))
  environment = {**os.environ, "PYTHONPATH": str(root)}
  with subprocess.Popen(
    command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if "50 %, evolution 5" in line:
        process.kill()
  assert process.returncode == -9
  log, lines = SearchLog(tmp_path / "search.csv"), []
  found = run(log=log, checkpoints=Checkpoints(tmp_path / "states"), show=lines.append)
  whole = SearchLog(tmp_path / "whole.csv")
  expected = run(log=whole)
  assert "50 %, evolution 5" in lines[0]  # behind the checkpoint of generation 4
  np.testing.assert_array_equal(found.order, expected.order)
  assert plain(log.rows()) == plain(whole.rows())
