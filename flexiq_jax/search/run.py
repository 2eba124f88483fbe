"""One call for every search method."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flexiq_jax import calibration, distributed, rules, selection
from flexiq_jax.checkpoint import Checkpoints
from flexiq_jax.flexiq import FlexiQ, Network
from flexiq_jax.search.evolve import evolve
from flexiq_jax.search.fitness import AXIS, Fitness
from flexiq_jax.search.flips import Flips
from flexiq_jax.search.gram import gram_search
from flexiq_jax.search.influence import Influence
from flexiq_jax.search.log import SearchLog
from flexiq_jax.search.settings import SearchSettings
from flexiq_jax.search.ties import Ties
from flexiq_jax.search.track import Found, Track
from flexiq_jax.selection import Schedule, Space

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
  greedy = selection.greedy(space, scores)
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


def improve(
  model: FlexiQ,
  images: Array,
  settings: SearchSettings | None = None,
  *,
  seed: int = 0,
  show: Callable[[str], None] | None = None,
) -> FlexiQ:
  """Searches a better order for a model, on all devices.

  Args:
    model: as `flexiq.quantize` makes it, without shift blocks.
    images: `[n, ...]` training images.
    settings: of the search.
    seed: of everything random in it.
    show: called with a line of progress now and then.

  Returns:
    The model with the order that was found.

  Raises:
    ValueError: as `search`, and for a model with shift blocks.
  """
  if any(q.low is not None and q.low.block is not None for q in model.model.values()):
    raise ValueError(
      "model: its shift blocks go with the order it has; search in a model whose shift_block is 0, "
      "then share the shifts along the order that was found (flexiq.lay_out)"
    )
  network, space = model.network, model.schedule.space
  errors = calibration.observe_errors(
    network.apply, network.params, model.model, [images], platform=network.platform
  )
  found = search(
    network,
    model.model,
    space,
    selection.exact_scores(space, errors),
    images,
    settings or SearchSettings(),
    seed=seed,
    show=show,
    mesh=population_mesh(),
  )
  return dataclasses.replace(model, schedule=Schedule(space, found.order))


def population_mesh() -> Mesh | None:
  """All devices of all processes, for `search`; None where there is one."""
  if jax.device_count() == 1:
    return None
  return jax.make_mesh((jax.device_count(),), (AXIS,))
