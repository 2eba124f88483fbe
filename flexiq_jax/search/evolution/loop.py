"""Evolutionary search against the model's output: FlexiQ's Algorithm 1 (docs/flexiq.md, step E).

The operators are in operators.py. This is the loop around them: levels, evaluation,
stop rules, record and checkpoints.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.runs import files
from flexiq_jax.search.evolution import operators
from flexiq_jax.search.fitness import Fitness
from flexiq_jax.search.record import Found, Track
from flexiq_jax.search.settings import SearchSettings

Array = Any


def evolve(
  track: Track,
  scores: np.ndarray,
  settings: SearchSettings,
  seeds: Sequence[np.ndarray],
) -> Found:
  """Searches an order.

  Args:
    track: the fitness and the record.
    scores: float `[T]`, error of each group alone; they guide mutation and noisy seeds.
    settings: of the search.
    seeds: orders int `[T]` of the first population; the best found is never worse than any.

  Returns:
    The order, with the fitness of each level's mask.
  """
  archive = Archive(track.fitness, settings.halving)
  space = track.fitness.space
  levels = [tuple(settings.levels)]
  if settings.mode == "progressive":
    levels = [(level,) for level in settings.levels]
  orders = list(seeds)
  progress = {"level": 0, "generation": -1, "stale": 0}
  prefix = np.zeros(0, np.int64)
  state, restored = None, track.restore(_template(space, settings))
  if restored:
    tree, metadata = restored
    progress, state = metadata["progress"], tree["state"]
    prefix = np.asarray(tree["prefix"])[: metadata["prefix"]]
    archive.load(metadata["archive"])

  for number in range(progress["level"], len(levels)):
    level = levels[number]
    problem = operators.Problem.create(space, scores, level, order=prefix)
    of = _Scale(archive, problem, orders[0])
    share = (number + 1) / len(levels)
    ratio = level[0] if len(level) == 1 else None
    if state is None:
      key, seed_key = jax.random.split(jax.random.fold_in(track.key, number))
      keys = operators.seeds(seed_key, problem, settings.evolution, orders)
      masks = np.asarray(jax.vmap(operators.decode, (None, 0))(problem, keys))
      # Of the given orders no estimate will do: the best is never worse than any of them.
      archive(masks[: len(orders)].reshape(-1, space.total), full=True)
      fitness = of(masks)
      state = operators.init(key, keys, fitness)
      progress = {"level": number, "generation": 0, "stale": 0}
      track.row(
        ratio=ratio, step=0, best=float(state.fitness[0]), mean=_mean(fitness), stage="seeds"
      )
    for generation in range(progress["generation"] + 1, settings.generations + 1):
      if track.over(share) or 0 < settings.patience <= progress["stale"]:
        break
      best = float(state.fitness[0])
      state, offspring, masks, differ = operators.ask(state, problem, settings.evolution)
      fitness = of(masks)
      state = operators.tell(state, offspring, fitness, settings.evolution)
      stale = 0 if float(state.fitness[0]) < best else progress["stale"] + 1
      progress = {"level": number, "generation": generation, "stale": stale}
      track.row(
        ratio=ratio,
        step=generation,
        best=float(state.fitness[0]),
        mean=_mean(fitness),
        differ=float(np.mean(differ)),
        stage="evolution",
        of=settings.generations,
      )
      if generation % settings.checkpoint_every == 0:
        _save(track, space, state, progress, prefix, archive)
    found = operators.order_of(problem, state.keys[0])
    prefix = found[: Schedule(space, found).prefix(level[-1])]
    orders = [found, *seeds][: settings.population]
    state, progress = None, {"level": number + 1, "generation": -1, "stale": 0}
  schedule = Schedule(space, np.asarray(orders[0]))
  values = archive(schedule.stack(settings.levels), full=True)
  return Found(
    order=schedule.order,
    fitness=dict(zip(settings.levels, values.tolist(), strict=True)),
    forwards=track.fitness.forwards,
    seconds=track.seconds,
  )


class Archive:
  """Fitness of masks, each evaluated once."""

  def __init__(self, fitness: Fitness, halving: bool = False):
    """Keeps what to evaluate with.

    Args:
      fitness: evaluates masks `[P, T]`.
      halving: successive halving; a mask that drops out gets its estimate on the images seen, and
        never a better value than any that stayed.
    """
    self._fitness, self._halving = fitness, halving
    self._known: dict[str, float] = {}
    self._estimates: dict[str, float] = {}

  def __call__(self, masks: np.ndarray, full: bool = False) -> np.ndarray:
    """Fitness float64 `[P]` of masks bool `[P, T]`; `full` takes no estimate for it."""
    names = [_digest(mask) for mask in masks]
    have = self._known if full else self._estimates | self._known
    new = {name: i for i, name in enumerate(names) if name not in have}
    rows = masks[list(new.values())]
    if self._halving and not full and len(new) > 1:
      values, stayed = halved(self._fitness, rows)
      for name, value, known in zip(new, values.tolist(), stayed, strict=True):
        (self._known if known else self._estimates)[name] = value
    elif new:
      self._known.update(zip(new, self._fitness(rows).tolist(), strict=True))
    return np.array([self._known.get(n, self._estimates.get(n)) for n in names], np.float64)

  def dump(self) -> dict[str, dict[str, float | str]]:
    """What is known, as JSON can hold it."""
    return files.to_plain({"known": self._known, "estimates": self._estimates})

  def load(self, dumped: dict[str, dict[str, float | str]]) -> None:
    """Takes what `dump` gave."""
    self._known, self._estimates = (
      {name: float(value) for name, value in dumped[kind].items()}
      for kind in ("known", "estimates")
    )


def halved(fitness: Fitness, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Successive halving: all on a quarter of the images, half of them on half, a quarter on all.

  Shares are of whole blocks, rounded up; with fewer than four blocks there are fewer rounds.

  Args:
    fitness: evaluates masks on a part of the images.
    masks: bool `[P, T]`.

  Returns:
    float64 `[P]`: the full fitness of those that stayed; the others' mean on the images they were
    evaluated on, raised above (also in float32) the fitness of all that stayed longer. And bool
    `[P]`, which stayed.
  """
  values, alive = np.full(len(masks), np.nan), np.arange(len(masks))
  seen = np.zeros((len(masks), 0), np.float32)
  blocks, dropped = fitness.blocks, []
  ends = sorted({-(-blocks // 4), -(-blocks // 2), blocks})
  for start, end in itertools.pairwise([0, *ends]):
    part = fitness.per_image(masks[alive], (start / blocks, end / blocks))
    seen = np.concatenate([seen, part], axis=1)
    mean = seen.mean(axis=1, dtype=np.float64)
    mean = np.where(np.isfinite(mean), mean, np.inf)
    values[alive] = mean
    if end < blocks:
      ranked = np.argsort(mean, kind="stable")
      keep = np.sort(ranked[: max(1, len(ranked) // 2)])
      dropped.append(np.delete(alive, keep))
      alive, seen = alive[keep], seen[keep]
  stayed = np.isin(np.arange(len(masks)), alive)
  for out in reversed(dropped):
    floor = np.nextafter(values[alive].max().astype(np.float32), np.float32(np.inf))
    values[out] = np.maximum(values[out], floor)
    alive = np.concatenate([alive, out])
  return values, stayed


class _Scale:
  """Fitness of individuals from their masks at V levels: the mean of the levels' own.

  With several levels each counts relative to the greedy seed's, or the highest would decide alone.
  """

  def __init__(self, archive: Archive, problem: operators.Problem, order: np.ndarray):
    self._archive = archive
    self._unit = np.ones(1)
    if len(problem.thresholds) > 1:
      masks = operators.decode(problem, operators.keys_of(order))
      unit = archive(np.asarray(masks), full=True)
      self._unit = np.where(unit > 0, unit, 1.0)  # 1 for NaN, too

  def __call__(self, masks: Array) -> np.ndarray:
    masks = np.asarray(masks)
    values = self._archive(masks.reshape(-1, masks.shape[-1])).reshape(masks.shape[:2])
    return (values / self._unit[None]).mean(axis=1).astype(np.float32)


def _mean(fitness: np.ndarray) -> float | None:
  finite = fitness[np.isfinite(fitness)]
  return float(finite.mean()) if len(finite) else None


def _digest(mask: np.ndarray) -> str:
  return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=16).hexdigest()


def _template(space: Space, settings: SearchSettings) -> dict[str, Any]:
  population, total = settings.population, space.total
  state = operators.init(
    jax.random.key(0), np.zeros((population, total), np.float32), np.zeros(population, np.float32)
  )
  return {"state": state, "prefix": np.zeros(total, np.int64)}


def _save(track: Track, space: Space, state, progress, prefix, archive: Archive) -> None:
  padded = np.zeros(space.total, np.int64)
  padded[: len(prefix)] = prefix
  track.save(
    {"state": state, "prefix": padded},
    progress=progress,
    prefix=len(prefix),
    archive=archive.dump(),
  )
