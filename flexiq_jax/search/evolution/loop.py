"""Evolutionary search against the model's output: FlexiQ's Algorithm 1 (docs/flexiq.md, step E).

The operators are in operators.py. This is the loop around them: levels, evaluation,
stop rules, record and checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search.archive import Archive
from flexiq_jax.search.evolution import operators
from flexiq_jax.search.evolution.keys import Encoding, decode, keys_of, order_of
from flexiq_jax.search.record import Found, Record
from flexiq_jax.search.settings import SearchSettings

Array = Any


def run(
  start: Callable[..., Record],
  scores: np.ndarray,
  settings: SearchSettings,
  seeds: Sequence[np.ndarray],
) -> Found:
  """Searches an order; a line of the table in search/run.py.

  Args:
    start: opens the `Record` of a search, by the `method`'s name.
    scores: float `[T]`, error of each group alone.
    settings: of the search.
    seeds: orders int `[T]` to start from.
  """
  with start(method="evolution") as record:
    return evolve(record, scores, settings, seeds)


def evolve(
  record: Record,
  scores: np.ndarray,
  settings: SearchSettings,
  seeds: Sequence[np.ndarray],
) -> Found:
  """Searches an order.

  Args:
    record: of the search, with its fitness.
    scores: float `[T]`, error of each group alone; they guide mutation and noisy seeds.
    settings: of the search.
    seeds: orders int `[T]` of the first population; the best found is never worse than any.

  Returns:
    The order, with the fitness of each level's mask.
  """
  archive = Archive(record.fitness, settings.halving)
  space = record.fitness.space
  levels = [tuple(settings.levels)]
  if settings.mode == "progressive":
    levels = [(level,) for level in settings.levels]
  orders = list(seeds)
  progress = {"level": 0, "generation": -1, "stale": 0}
  prefix = np.zeros(0, np.int64)
  state, restored = None, record.restore(_template(space, settings))
  if restored:
    tree, metadata = restored
    progress, state = metadata["progress"], tree["state"]
    prefix = np.asarray(tree["prefix"])[: metadata["prefix"]]
    archive.load(metadata["archive"])

  for number in range(progress["level"], len(levels)):
    level = levels[number]
    encoding = Encoding.create(space, scores, level, order=prefix)
    of = _Scale(archive, encoding, orders[0])
    share = (number + 1) / len(levels)
    ratio = level[0] if len(level) == 1 else None
    if state is None:
      key, seed_key = jax.random.split(jax.random.fold_in(record.key, number))
      keys = operators.seeds(seed_key, encoding, settings.evolution, orders)
      masks = np.asarray(jax.vmap(decode, (None, 0))(encoding, keys))
      # Of the given orders no estimate will do: the best is never worse than any of them.
      archive(masks[: len(orders)].reshape(-1, space.total), full=True)
      fitness = of(masks)
      state = operators.init(key, keys, fitness)
      progress = {"level": number, "generation": 0, "stale": 0}
      record.step(0, ratio=ratio, best=float(state.fitness[0]), mean=_mean(fitness), stage="seeds")
    for generation in range(progress["generation"] + 1, settings.generations + 1):
      if record.over(share) or 0 < settings.patience <= progress["stale"]:
        break
      best = float(state.fitness[0])
      state, offspring, masks, differ = operators.ask(state, encoding, settings.evolution)
      fitness = of(masks)
      state = operators.tell(state, offspring, fitness, settings.evolution)
      stale = 0 if float(state.fitness[0]) < best else progress["stale"] + 1
      progress = {"level": number, "generation": generation, "stale": stale}
      record.step(
        generation,
        ratio=ratio,
        best=float(state.fitness[0]),
        mean=_mean(fitness),
        differ=float(np.mean(differ)),
        stage="evolution",
        of=settings.generations,
      )
      if generation % settings.checkpoint_every == 0:
        _save(record, space, state, progress, prefix, archive)
    found = order_of(encoding, state.keys[0])
    prefix = found[: Schedule(space, found).prefix(level[-1])]
    orders = [found, *seeds][: settings.population]
    state, progress = None, {"level": number + 1, "generation": -1, "stale": 0}
  schedule = Schedule(space, np.asarray(orders[0]))
  values = archive(schedule.stack(settings.levels), full=True)
  return record.found(schedule.order, settings.levels, values)


class _Scale:
  """Fitness of individuals from their masks at V levels: the mean of the levels' own.

  With several levels each counts relative to the greedy seed's, or the highest would decide alone.
  """

  def __init__(self, archive: Archive, encoding: Encoding, order: np.ndarray):
    self._archive = archive
    self._unit = np.ones(1)
    if len(encoding.thresholds) > 1:
      masks = decode(encoding, keys_of(order))
      unit = archive(np.asarray(masks), full=True)
      self._unit = np.where(unit > 0, unit, 1.0)  # 1 for NaN, too

  def __call__(self, masks: Array) -> np.ndarray:
    masks = np.asarray(masks)
    values = self._archive(masks.reshape(-1, masks.shape[-1])).reshape(masks.shape[:2])
    return (values / self._unit[None]).mean(axis=1).astype(np.float32)


def _mean(fitness: np.ndarray) -> float | None:
  finite = fitness[np.isfinite(fitness)]
  return float(finite.mean()) if len(finite) else None


def _template(space: Space, settings: SearchSettings) -> dict[str, Any]:
  population, total = settings.population, space.total
  state = operators.init(
    jax.random.key(0), np.zeros((population, total), np.float32), np.zeros(population, np.float32)
  )
  return {"state": state, "prefix": np.zeros(total, np.int64)}


def _save(record: Record, space: Space, state, progress, prefix, archive: Archive) -> None:
  padded = np.zeros(space.total, np.int64)
  padded[: len(prefix)] = prefix
  record.save(
    {"state": state, "prefix": padded},
    progress=progress,
    prefix=len(prefix),
    archive=archive.dump(),
  )
