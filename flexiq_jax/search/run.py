"""One call for every search method."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flexiq_jax import orders
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, Space
from flexiq_jax.quant import rules
from flexiq_jax.runs import distributed
from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.search.evolution.loop import evolve
from flexiq_jax.search.fitness import AXIS, Fitness
from flexiq_jax.search.gram.flips import Flips
from flexiq_jax.search.gram.influence import Influence
from flexiq_jax.search.gram.loop import gram_search
from flexiq_jax.search.gram.ties import Ties
from flexiq_jax.search.log import SearchLog
from flexiq_jax.search.record import Found, Track
from flexiq_jax.search.settings import SearchSettings

Array = Any


def search(
  network: Network,
  model: rules.QModel,
  space: Space,
  scores: np.ndarray,
  images: Array,
  settings: SearchSettings,
  *,
  seed: int = 0,
  workdir: Path | None = None,
  made_from: Any = None,
  show: Callable[[str], None] | None = None,
  mesh: Mesh | None = None,
) -> Found:
  """Finds the order in which channel groups go to 4 bits.

  Args:
    network: the float model.
    model: its quantized layers, those of the space with their 4-bit side.
    space: the channel groups.
    scores: float `[T]`, error of each group alone (`flexiq.score`).
    images: `[n, ...]` search images: training data.
    settings: of the search.
    seed: of everything random in it.
    workdir: where `search.csv` and the checkpoints (`search/`) go; a search that was killed there
      goes on from its last checkpoint. None keeps nothing.
    made_from: plain values that the result depends on besides the settings and the seed.
    show: called with a line of progress now and then.
    mesh: devices that share the population (`population_mesh`); None uses one. Several processes
      call this with the same values, but `workdir` and `show` are the main one's.

  Returns:
    The order, and what it reached.

  Raises:
    ValueError: too few images, a memory budget that is too small, scores that do not fit, logits
      that are not finite, or a workdir of a search of something else.
  """
  if not distributed.is_main():  # the others search along, in silence
    workdir, show = None, None
  if settings.images:
    images = images[: settings.images]
  if settings.method == "gram" and len(images) < 2:
    raise ValueError(f"images: {len(images)}; a Gram matrix is measured on at least 2 images")
  fitness = Fitness(
    network,
    model,
    space,
    images,
    distance=settings.distance,
    memory=settings.memory,
    capacity=settings.population if settings.method == "evolution" else settings.candidates,
    block=settings.block,
    mesh=mesh,
  )
  greedy = orders.greedy(space, scores)
  log = SearchLog(workdir / "search.csv") if workdir else None
  start = dict(
    zip(
      settings.levels, fitness(Schedule(space, greedy).stack(settings.levels)).tolist(), strict=True
    )
  )
  finite = {ratio: value for ratio, value in start.items() if math.isfinite(value)}
  if workdir and log and {r["ratio"]: r["best"] for r in log.rows("greedy", seed)} != finite:
    workdir.mkdir(parents=True, exist_ok=True)
    log.cut("greedy", seed, 0)  # what a kill left of them, or other settings
    for ratio, value in finite.items():
      log.add(
        **{"method": "greedy", "stage": "greedy", "ratio": ratio, "seed": seed, "step": 0},
        **{"forwards": 0.0, "seconds": 0.0, "best": value, "mean": value},
      )
  if settings.method == "greedy":
    return Found(order=greedy, fitness=start, forwards=fitness.forwards, seconds=0.0)
  fitness.forwards = 0.0

  def track(method: str, seconds: float = 0.0) -> Track:
    return Track(
      fitness,
      method=method,
      seed=seed,
      made_from={"settings": dataclasses.asdict(settings), "seed": seed, "of": made_from},
      log=log,
      checkpoints=Checkpoints(workdir / "search" / method) if workdir else None,
      show=show,
      max_minutes=settings.max_minutes,
      max_forwards=settings.max_forwards,
      seconds=seconds,
    )

  if settings.method == "evolution":
    with track("evolution") as record:
      return evolve(record, scores, settings, [greedy])
  with track("gram") as record:
    ties = Ties(space, scores, settings.max_groups)
    influence = (
      Flips(fitness, ties)
      if settings.effects == "flips"
      else Influence(
        fitness, ties, probes=settings.probes, memory=settings.memory, block=settings.block
      )
    )
    found = gram_search(record, influence, settings, [greedy])
  if not settings.polish:
    return found
  with track("gram+evolution", found.seconds) as record:
    fitness.forwards = found.forwards
    short = dataclasses.replace(settings, generations=settings.polish)
    return evolve(record, scores, short, [found.order, greedy])


def population_mesh() -> Mesh | None:
  """All devices of all processes, for `search`; None where there is one."""
  if jax.device_count() == 1:
    return None
  return jax.make_mesh((jax.device_count(),), (AXIS,))
