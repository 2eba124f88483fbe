"""What every search shares: its clock, its steps in the log, its progress, its checkpoints."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax.runs import distributed, files
from flexiq_jax.runs.checkpoint import Checkpoints, Restored, pack, unpack
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import log
from flexiq_jax.search.fitness import Fitness


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search found.

  Attributes:
    order: int `[T]`, who goes to 4 bits first.
    fitness: level -> distance of its mask, mean per example; of the true model.
    forwards: cost, in forward passes over the search examples.
    seconds: time.
  """

  order: Any
  fitness: dict[float, float]
  forwards: float
  seconds: float


class Record:
  """The record of one search, so that a killed one goes on as if nothing had happened.

  A context manager. Of several processes only the main one has a log, checkpoints and a say about
  the time.

  Attributes:
    fitness: what is searched; its count of forward passes is part of the record.
    key: typed random key of the seed.
  """

  def __init__(
    self,
    fitness: Fitness,
    *,
    method: str,
    seed: int,
    made_from: Any = None,
    workdir: Workdir | None = None,
    show: Callable[[str], None] | None = None,
    max_minutes: float = 0.0,
    max_forwards: float = 0.0,
    seconds: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      fitness: what is searched.
      method: its name.
      seed: of the search.
      made_from: plain values that the result depends on; a checkpoint made from others is refused.
      workdir: where steps (its log) and states (`search/` and the method) go; None keeps none.
      show: called with a line for each step.
      max_minutes: 0 sets no limit.
      max_forwards: the same.
      seconds: spent already, by a search that this one goes on from.
      clock: seconds, any origin.
    """
    self.fitness, self.key = fitness, jax.random.key(seed)
    self._method, self._seed, self._made_from = method, seed, files.to_plain(made_from)
    self._workdir, self._show = workdir, show
    self._checkpoints = Checkpoints(workdir.path / "search" / method) if workdir else None
    self._limit, self._most, self._clock = 60 * max_minutes, max_forwards, clock
    self._ticked = clock()
    self._start = self._ticked - seconds
    self._steps, self._saved, self._level_start = 0, -1, seconds

  def __enter__(self) -> "Record":
    return self

  def __exit__(self, *error: object) -> None:
    if self._checkpoints:
      self._checkpoints.close()

  @property
  def seconds(self) -> float:
    """Time spent searching, earlier starts included."""
    return self._clock() - self._start

  def over(self, share: float = 1.0) -> bool:
    """Whether this share of the limit of time or of evaluations is spent."""
    late = self._limit > 0 and distributed.agree(self.seconds >= share * self._limit)
    return late or (self._most > 0 and self.fitness.forwards >= share * self._most)

  def step(
    self,
    number: int,
    *,
    ratio: float | None,
    best: float,
    mean: float | None,
    stage: str,
    differ: float | None = None,
    of: int | None = None,
  ) -> None:
    """Records one step; one without any finite fitness is shown only.

    Args:
      number: of the step at this level, 0 for the seeds.
      ratio: level; None for all at once.
      best: best fitness so far; inf where none is finite.
      mean: mean fitness of the step's candidates.
      stage: what the step was.
      differ: share of candidates that differ from their parents.
      of: number of steps of the level, for the time left.
    """
    if math.isfinite(best):
      self._steps += 1
      if self._workdir:
        log.add(
          self._workdir,
          method=self._method,
          ratio=ratio,
          seed=self._seed,
          step=number,
          forwards=self.fitness.forwards,
          seconds=self.seconds,
          best=best,
          mean=mean,
          differ=differ,
          stage=stage,
        )
    if self._show:
      level = "all levels" if ratio is None else f"{100 * ratio:g} %"
      rate = self.fitness.forwards / max(self.seconds, 1e-9)
      if number == 0:
        self._level_start = self.seconds
      left = (self.seconds - self._level_start) / max(number, 1) * ((of or 0) - number)
      self._show(
        f"{self._method} {level}, {stage} {number}{f'/{of}' if of else ''}"
        + f": best distance {best:.4g}"
        + (f", mean {mean:.4g}" if mean is not None else "")
        + f", {self.fitness.forwards:.0f} forward passes ({rate:.2f}/s), {self.seconds:.0f} s"
        + (f", about {left:.0f} s of this level left" if number and left > 0 else "")
      )

  def found(self, order: np.ndarray, levels: Sequence[float], fitness: np.ndarray) -> Found:
    """What the search found: an order, with the fitness float64 `[V]` of its V levels' masks."""
    return Found(
      order=order,
      fitness=dict(zip(levels, fitness.tolist(), strict=True)),
      forwards=self.fitness.forwards,
      seconds=self.seconds,
    )

  def note(self, text: str) -> None:
    """Shows a line."""
    if self._show:
      self._show(f"{self._method}: {text}")

  @property
  def _remedy(self) -> str:
    folder = self._checkpoints.directory if self._checkpoints else None
    return f"remove {folder} or name another workdir"

  def tick(self, text: str, interval: float = 10.0) -> None:
    """Shows a line, at most one in `interval` seconds."""
    if self._clock() - self._ticked >= interval:
      self._ticked = self._clock()
      self.note(text)

  def save(self, tree: Any, **metadata: Any) -> None:
    """Saves a state; steps recorded later do not count for a search that goes on from it."""
    if self._checkpoints is None:
      return
    self._saved += 1
    plain = {
      "made_from": self._made_from,
      "steps": self._steps,
      "seconds": self.seconds,
      "forwards": self.fitness.forwards,
      **metadata,
    }
    self._checkpoints.save(self._saved, tree, plain)

  def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest state and its metadata; None where there is none.

    Raises:
      ValueError: the checkpoint was made from other values, or for other shapes.
    """
    found = self._latest(template)
    if distributed.several():
      data = pack(found.tree, [found.step, found.metadata]) if found else None
      data = distributed.broadcast_bytes(data)
      tree, plain = unpack(template, data) if data else (None, None)
      found = Restored(plain[0], tree, plain[1]) if plain else None
    if found is None:
      self._keep(0)
      return None
    self._saved = found.step
    self._start = self._clock() - found.metadata["seconds"]
    self.fitness.forwards = found.metadata["forwards"]
    self._keep(found.metadata["steps"])
    return found.tree, found.metadata

  def _keep(self, steps: int) -> None:
    self._steps = steps
    if self._workdir:
      log.keep(self._workdir, self._method, self._seed, steps)

  def _latest(self, template: Any) -> Restored | None:
    """The newest checkpoint, if there is one that was made for this search."""
    try:
      found = self._checkpoints.restore_latest(template) if self._checkpoints else None
    except ValueError as error:
      raise ValueError(f"{error}. If it was made with other settings: {self._remedy}") from error
    if found is not None and found.metadata["made_from"] != self._made_from:
      raise ValueError(
        f"checkpoint: it was made for another model, data or search settings; {self._remedy}"
      )
    return found
