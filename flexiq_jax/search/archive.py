"""Fitness of masks that were evaluated, so that no search pays for one of them twice."""

import hashlib
import itertools

import numpy as np

from flexiq_jax.runs import files
from flexiq_jax.search.fitness import Fitness


class Archive:
  """Fitness of masks, each evaluated once."""

  def __init__(self, fitness: Fitness, halving: bool = False):
    """Keeps what to evaluate with.

    Args:
      fitness: evaluates masks `[P, T]`.
      halving: successive halving; a mask that drops out gets its estimate on the examples seen, and
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
  """Successive halving: all on a quarter of the examples, half of them on half, a quarter on all.

  Shares are of whole blocks, rounded up; with fewer than four blocks there are fewer rounds.

  Args:
    fitness: evaluates masks on a part of the examples.
    masks: bool `[P, T]`.

  Returns:
    float64 `[P]`: the full fitness of those that stayed; the others' mean on the examples they were
    evaluated on, raised above (also in float32) the fitness of all that stayed longer. And bool
    `[P]`, which stayed.
  """
  values, alive = np.full(len(masks), np.nan), np.arange(len(masks))
  seen = np.zeros((len(masks), 0), np.float32)
  blocks, dropped = fitness.blocks, []
  ends = sorted({-(-blocks // 4), -(-blocks // 2), blocks})
  for start, end in itertools.pairwise([0, *ends]):
    part = fitness.per_example(masks[alive], (start / blocks, end / blocks))
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


def _digest(mask: np.ndarray) -> str:
  return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=16).hexdigest()
