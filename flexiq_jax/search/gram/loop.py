"""Search on a quadratic model of the output distance, checked against the model itself.

The Gram matrix of all groups' effects on the logits (`influence`), measured once around the 8-bit
model, predicts every mask's distance, effects between layers included. Annealing on that
prediction tries a hundred thousand masks in the time of a few forward passes. The best are
evaluated truly; around the best of those the model is measured anew, with the true residual, and
searched within growing trust regions. CLADO (arXiv 2307.05657) builds such a matrix for layers, by
pairs of forward passes; docs/flexiq.md, step E, says what is different here.

| symbol | meaning |
|---|---|
| T | channel groups, or ties of groups where there are too many |
| V | levels |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search.archive import Archive
from flexiq_jax.search.evolution import evolve
from flexiq_jax.search.gram import surrogate
from flexiq_jax.search.gram.flips import Flips
from flexiq_jax.search.gram.influence import Influence
from flexiq_jax.search.gram.surrogate import Quadratic
from flexiq_jax.search.gram.ties import Ties
from flexiq_jax.search.record import Found, Record
from flexiq_jax.search.settings import SearchSettings

Array = Any


@dataclasses.dataclass
class _State:
  """Where the search stands; saved after every step.

  Attributes:
    gram: float64 `[T, T]`, mean Gram matrix of the effects of going to 4 bits.
    share: its shrinkage if it were of one measurement.
    measured: how many measurements it is the mean of.
    base, value, gradient: of the newest measurement.
    best: bool `[V, T]`, the best mask of each level.
    fitness: float64 `[V]`, theirs.
    level, round: the next step.
  """

  gram: np.ndarray
  share: float
  measured: int
  base: np.ndarray
  value: float
  gradient: np.ndarray
  best: np.ndarray
  fitness: np.ndarray
  level: int = 0
  round: int = 0

  @classmethod
  def empty(cls, total: int, levels: int) -> "_State":
    return cls(
      gram=np.zeros((total, total)),
      share=0.0,
      measured=0,
      base=np.zeros(total, bool),
      value=0.0,
      gradient=np.zeros(total),
      best=np.zeros((levels, total), bool),
      fitness=np.full(levels, np.inf),
    )

  def add(self, quadratic: Quadratic, share: float) -> None:
    """Takes a measurement in: its residual as it is, its Gram matrix into the mean."""
    self.base, self.value, self.gradient = quadratic.base, quadratic.value, quadratic.gradient
    gram = quadratic.moved(np.zeros_like(quadratic.base)).gram
    self.share = (self.share * self.measured + share) / (self.measured + 1)
    self.gram += (gram - self.gram) / (self.measured + 1)
    self.measured += 1

  def model(self) -> Quadratic:
    """The quadratic model around the newest measurement, shrunk for what its matrix does not know.

    The variance of a mean falls with the number of measurements, and so does the best shrinkage.
    """
    sign = np.where(self.base, -1.0, 1.0)
    gram = sign[:, None] * self.gram * sign
    model = Quadratic(base=self.base, value=self.value, gradient=self.gradient, gram=gram)
    return model.toward_diagonal(self.share / self.measured)


def run(
  start: Callable[..., Record],
  scores: np.ndarray,
  settings: SearchSettings,
  seeds: Sequence[np.ndarray],
) -> Found:
  """Searches an order, and polishes it if so set; for the arguments see `evolution.run`.

  Raises:
    ValueError: fewer than two examples.
  """
  with start(method="gram") as record:
    fitness = record.fitness
    if fitness.examples < 2:
      raise ValueError(
        f"examples: {fitness.examples}; a Gram matrix is measured on at least 2 examples"
      )
    ties = Ties(fitness.space, scores, settings.max_groups)
    if settings.effects == "flips":
      influence = Flips(fitness, ties)
    else:
      influence = Influence(
        fitness, ties, probes=settings.probes, memory=settings.memory, block=settings.block
      )
    found = gram_search(record, influence, settings, seeds)
  if not settings.polish:
    return found
  with start(method="gram+evolution", seconds=found.seconds) as record:
    short = dataclasses.replace(settings, generations=settings.polish)
    return evolve(record, scores, short, [found.order, *seeds])


def gram_search(
  record: Record,
  influence: Influence | Flips,
  settings: SearchSettings,
  seeds: Sequence[np.ndarray],
) -> Found:
  """Searches an order.

  Args:
    record: of the search, with its fitness.
    influence: measures the quadratic model.
    settings: of the search.
    seeds: orders int `[T]`, as greedy's; no level's mask is worse than theirs on top of the level
      below it.

  Returns:
    The order, with the fitness of each level's mask.
  """
  ties, archive = influence.ties, Archive(record.fitness)
  space, levels = ties.space, settings.levels
  state = _State.empty(space.total, len(levels))
  restored = record.restore(dataclasses.asdict(state))
  if restored:
    state = _State(**restored[0])
    archive.load(restored[1]["archive"])
  else:
    record.note(influence.describe())
  orders = [ties.coarse(order) for order in seeds]
  while state.level < len(levels):
    _step(record, influence, archive, settings, orders, state)
    record.save(dataclasses.asdict(state), archive=archive.dump())
  order = surrogate.arrange(state.model(), space, list(state.best), levels)
  schedule = Schedule(record.fitness.space, ties.fine(order))
  values = archive(schedule.stack(levels))
  return record.found(schedule.order, levels, values)


def _step(
  record: Record,
  influence: Influence | Flips,
  archive: Archive,
  settings: SearchSettings,
  orders: Sequence[np.ndarray],
  state: _State,
) -> None:
  """One round of one level: measure, anneal, evaluate the candidates, keep the best."""
  space, level, number = influence.ties.space, state.level, state.round
  ratio, total = settings.levels[level], space.total
  frozen = state.best[level - 1] if level else np.zeros(total, bool)
  key = jax.random.fold_in(jax.random.fold_in(record.key, level), number)
  measure_key, anneal_key = jax.random.split(key)
  if number or not level:
    base = state.best[level] if number else frozen
    tick = lambda share: record.tick(f"effects of all groups, {share:.0%} of the examples")
    state.add(*influence.measure(measure_key, base, tick))
  model = state.model()
  if number:
    free = int((state.best[level] & ~frozen).sum())
    limits = [total if i == 0 else max(2, 2 * free >> i) for i in range(settings.candidates)]
    start = state.best[level]
    masks = []
  else:
    limits = [total] * settings.candidates
    start = _completed(space, frozen, surrogate.fill(model, space, ratio, frozen))
    greedy = [_completed(space, frozen, _prefix(space, order, frozen, ratio)) for order in orders]
    masks = [start, *greedy]
  annealed, _ = surrogate.anneal(
    anneal_key, model, space, ratio, frozen=frozen, start=start, limits=limits
  )
  masks = np.unique(np.stack([*masks, *annealed]), axis=0)
  values = archive(influence.ties.expand(masks))
  ranked = np.where(np.isnan(values), np.inf, values)
  winner = int(np.argmin(ranked))
  better = ranked[winner] < state.fitness[level]
  if better:
    state.best[level], state.fitness[level] = masks[winner], ranked[winner]
  elif not number:  # nothing finite: the model's own choice, so that there is a mask
    state.best[level] = start
  finite = values[np.isfinite(values)]
  record.step(
    number,
    ratio=ratio,
    best=float(state.fitness[level]),
    mean=float(finite.mean()) if len(finite) else None,
    stage="gram",
    of=settings.rounds,
  )
  share = (level + 1) / len(settings.levels)
  # Without a finite fitness there is nothing to measure around.
  stuck = (number and not better) or not np.isfinite(state.fitness[level])
  if number >= settings.rounds or stuck or record.over(share):
    state.level, state.round = level + 1, 0
  else:
    state.round += 1


def _completed(space: Space, inside: np.ndarray, more: np.ndarray) -> np.ndarray:
  mask = inside.copy()
  mask[more] = True
  return mask


def _prefix(space: Space, order: np.ndarray, frozen: np.ndarray, ratio: float) -> np.ndarray:
  """The groups of an order that reach a ratio after the frozen ones."""
  rest = order[~frozen[order]]
  whole = Schedule(space, np.concatenate([np.flatnonzero(frozen), rest]))
  return whole.order[: whole.prefix(ratio)]
