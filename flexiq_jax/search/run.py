"""One call for every search method."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flexiq_jax import orders
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, Space
from flexiq_jax.quant import rules
from flexiq_jax.runs import distributed
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import evolution, gram, log
from flexiq_jax.search.fitness import Distance, Fitness
from flexiq_jax.search.record import Found, Record
from flexiq_jax.search.settings import SearchSettings

Array = Any

# Method of the settings -> what searches, from the greedy order on (which is a method, too).
ALGORITHMS: dict[str, Callable[..., Found]] = {
  "gram": gram.run,
  "evolution": evolution.run,
}


def search(
  network: Network,
  model: rules.QModel,
  space: Space,
  scores: np.ndarray,
  examples: Array,
  settings: SearchSettings,
  *,
  seed: int = 0,
  distance: Distance | None = None,
  labels: Array | None = None,
  seeds: Sequence[np.ndarray] = (),
  workdir: Workdir | Path | None = None,
  made_from: Any = None,
  show: Callable[[str], None] | None = None,
  mesh: Mesh | None = None,
) -> Found:
  """Finds the order in which channel groups go to 4 bits.

  Args:
    network: the float model.
    model: its quantized layers, those of the space with their 4-bit side.
    space: the channel groups.
    scores: float `[T]`, error of each group alone (`Grouped.scores`).
    examples: `[n, ...]` search examples: training data.
    settings: of the search.
    seed: of everything random in it.
    distance: a function in place of the settings' distance (see `Fitness`). `gram` then measures
      squared distances, and chooses among the masks that these propose by the function.
    labels: `[n, ...]`, for a `distance` that compares logits with them.
    seeds: orders int `[T]` beside the greedy one; the result is not worse than they are.
    workdir: in whose log the steps go (`search.steps`), and the checkpoints (`search/`); a search
      that was killed there goes on from its last checkpoint. None keeps nothing.
    made_from: plain values that the result depends on besides the settings and the seed.
    show: called with a line of progress now and then.
    mesh: devices that share the population (`population_mesh`); None uses one. Several processes
      call this with the same values, but `workdir` and `show` are the main one's.

  Returns:
    The order, and what it reached.

  Raises:
    ValueError: too few examples, a memory budget that is too small, scores that do not fit, logits
      that are not finite, or a workdir of a search of something else.
  """
  if not distributed.is_main():  # the others search along, in silence
    workdir, show = None, None
  workdir = Workdir(workdir) if isinstance(workdir, Path) else workdir
  fitness = Fitness(
    network,
    model,
    space,
    examples[: settings.images or None],
    distance=distance or settings.distance,
    labels=labels if labels is None else labels[: settings.images or None],
    memory=settings.memory,
    capacity=settings.capacity,
    block=settings.block,
    mesh=mesh,
  )
  schedule = Schedule(space, orders.greedy(space, scores))
  values = fitness(schedule.stack(settings.levels)).tolist()
  greedy = Found(
    order=schedule.order,
    fitness=dict(zip(settings.levels, values, strict=True)),
    forwards=fitness.forwards,
    seconds=0.0,
  )
  if workdir:
    _note(workdir, greedy, seed)
  if settings.method == "greedy":
    return greedy
  fitness.forwards = 0.0
  start = functools.partial(
    Record,
    fitness,
    seed=seed,
    made_from={"settings": dataclasses.asdict(settings), "seed": seed, "of": made_from},
    workdir=workdir,
    show=show,
    max_minutes=settings.max_minutes,
    max_forwards=settings.max_forwards,
  )
  others = [order for order in seeds if not np.array_equal(order, greedy.order)]
  return ALGORITHMS[settings.method](start, scores, settings, [greedy.order, *others])


def _note(workdir: Workdir, greedy: Found, seed: int) -> None:
  """Records where searches start, unless it stands in the log already."""
  finite = {round(k, 6): value for k, value in greedy.fitness.items() if math.isfinite(value)}
  if {row["ratio"]: row["best"] for row in log.steps(workdir, "greedy", seed)} == finite:
    return
  log.keep(workdir, "greedy", seed, 0)  # what a kill left of it, or other settings
  for ratio, value in finite.items():
    log.add(
      workdir,
      **{"method": "greedy", "stage": "greedy", "ratio": ratio, "seed": seed, "step": 0},
      **{"forwards": 0.0, "seconds": 0.0, "best": value, "mean": value},
    )
