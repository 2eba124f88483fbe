"""How fast the fitness of a population of masks is computed, beside the ways without it.

    python benchmarks/population.py --json build/population.json

| way | what it does |
|---|---|
| `population` | `search.Fitness`: all individuals in one compiled call |
| `one_by_one` | the same compiled forward pass called for each mask, distances in NumPy |
| `torch` | ordinary PyTorch, two threads: hooks and exchanged weights (torch_search.py) |

Timed in one process and in turn; figures are medians of rounds, ratios are to `population` in the
same round. Two further parts: a generation of the evolutionary search, its own operators included,
and how the time grows with individuals and images (a straight line is fitted to all pairs).

The torch rows need torch, which only the environment of `make parity` has:

    make .venv-parity/.installed-parity
    PYTHONPATH=. .venv-parity/bin/python benchmarks/population.py

Pretrained weights where FLEXIQ_DATA is set, else random ones, which are as fast. Run it on an idle
machine: threads that wait for each other, as those of torch, lose more than their share of a busy
one (JSON has the load before each model).
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import loading, torch_search
from flexiq_jax import orders
from flexiq_jax.orders import Schedule
from flexiq_jax.runs import process
from flexiq_jax.search import EvolutionSettings, Fitness, evolution

# model -> (images, whether torch_search.py has it)
CASES = {"resnet20": (256, True), "vit_cifar10": (64, False)}
RATIO = 0.5
TOLERANCE = 1e-3  # of most images' distances, relative
_PAUSE = 0.3  # seconds in which the threads of the library that ran last stop to spin


@dataclasses.dataclass(frozen=True)
class Line:
  """`seconds = fixed + slope * work`, by least squares.

  Attributes:
    fixed: seconds.
    slope: seconds for each individual on all images.
    residual: largest distance of a point from the line, relative to the line.
  """

  fixed: float
  slope: float
  residual: float


def fit_line(work: Sequence[float], seconds: Sequence[float]) -> Line:
  """Fits a line; each point counts by its relative error, as long runs would else decide alone."""
  x, y = np.asarray(work, np.float64), np.asarray(seconds, np.float64)
  columns = np.stack([np.ones_like(x), x], axis=1)
  (fixed, slope), *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
  expected = fixed + slope * x
  return Line(float(fixed), float(slope), float(np.max(np.abs(y - expected) / expected)))


def in_turn(
  runs: Mapping[str, Callable[[], object]], rounds: int, pause: float = _PAUSE
) -> dict[str, list[float]]:
  """Seconds of each run in each round; a first round, which compiles, is not counted."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for i in range(rounds + 1):
    for name, run in runs.items():
      time.sleep(pause)
      start = time.perf_counter()
      run()
      if i:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def speeds(seconds: Mapping[str, Sequence[float]], count: int) -> dict[str, dict[str, float]]:
  """Medians of individuals a second, and of times relative to the first way's in the same round."""
  first = next(iter(seconds.values()))
  return {
    name: {
      "individuals_per_second": count / statistics.median(times),
      "time_relative_to_population": statistics.median(
        t / f for t, f in zip(times, first, strict=True)
      ),
    }
    for name, times in seconds.items()
  }


def one_by_one(loaded: loading.Loaded, fitness: Fitness, masks: np.ndarray) -> np.ndarray:
  """Distances `[P, n]` of masks by a call of the network for each."""
  values = []
  for mask in masks:
    chosen = loaded.space.split(mask)
    blocks = [
      np.asarray(loaded.network.mixed(loaded.model, chosen, fitness.host_examples[i : i + b]))
      for b in [fitness.block]
      for i in range(0, fitness.examples, b)
    ]
    values.append(np.square(np.concatenate(blocks) - fitness.reference).sum(axis=1))
  return np.stack(values)


def measure(
  loaded: loading.Loaded, *, population: int, rounds: int, peer: bool, pause: float = _PAUSE
) -> dict:
  """Times every way on one model.

  Args:
    loaded: the model and the images.
    population: individuals.
    rounds: that are timed.
    peer: time torch, too; a CIFAR ResNet.
    pause: seconds between two runs.

  Raises:
    RuntimeError: the ways differ in what they compute.
  """
  space, images = loaded.space, loaded.images
  fitness = Fitness(
    *(loaded.network, loaded.model, space, images),
    capacity=2 * population,
    block=max(1, min(64, len(images) // 4)),
  )
  traces = fitness.traces
  drawn = [orders.random(space, seed) for seed in range(2 * population)]
  every = np.stack([Schedule(space, order).mask(RATIO) for order in drawn])
  masks = every[:population]
  found: dict[str, np.ndarray] = {}
  ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "population": fitness.per_example,
    "one_by_one": lambda masks: one_by_one(loaded, fitness, masks),
  }
  theirs = None
  if peer:
    theirs = torch_search.TorchFitness(loaded.network, loaded.model, space, images)
    ways["torch"] = theirs.per_image
  runs = {
    name: lambda name=name, way=way: found.update({name: way(masks)}) for name, way in ways.items()
  }
  seconds = in_turn(runs, rounds, pause)
  document: dict[str, Any] = {
    "individuals": population,
    "images": len(images),
    "block": fitness.block,
    "groups": space.total,
    "speed": speeds(seconds, population),
    "distance_differs": differences(found),
  }
  if theirs is not None:
    document["torch_layout"] = theirs.layout
  document["generation"] = generation(loaded, fitness, theirs, population, rounds, pause)
  document["scaling"] = scaling(fitness, every, rounds)
  document["traces"], document["later_traces"] = traces, fitness.traces - traces
  return document


def differences(found: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """How much each way's distances `[P, n]` differ from the population's, relative.

  Most are the same. On a few images float32 sums round an activation to the other side of a step,
  and the image's distance changes; hence the median over images, and the means besides.

  Returns:
    way -> `median` over all individuals and images, `mean` of the difference of the mean of all
    distances, and `worst_individual`, the largest of the individuals' fitness.

  Raises:
    RuntimeError: a median is above `TOLERANCE`: this is not the same network.
  """
  ours, result = found["population"].astype(np.float64), {}
  for name, values in found.items():
    if name == "population":
      continue
    fitness = values.mean(axis=1) / ours.mean(axis=1) - 1
    result[name] = {
      "median": float(np.median(np.abs(values - ours) / np.maximum(ours, 1e-30))),
      "mean": abs(float(values.mean() / ours.mean() - 1)),
      "worst_individual": float(np.abs(fitness).max()),
    }
    if not result[name]["median"] < TOLERANCE:
      raise RuntimeError(
        f"{name}: distances differ from the population's by {result[name]['median']:.2g} (median); "
        f"below {TOLERANCE} is expected"
      )
  return result


def generation(
  loaded: loading.Loaded,
  fitness: Fitness,
  theirs: torch_search.TorchFitness | None,
  population: int,
  rounds: int,
  pause: float,
) -> dict:
  """Times a generation of each evolutionary search."""
  space, scores = loaded.space, loaded.scores
  elites = max(1, population // 8)
  settings = EvolutionSettings(population=population, elites=elites, tournament=min(3, population))
  encoding = evolution.Encoding.create(space, scores, [RATIO])
  keys = evolution.seeds(jax.random.key(0), encoding, settings, [orders.greedy(space, scores)])
  decoded = jax.vmap(evolution.decode, (None, 0))(encoding, keys)
  state = evolution.init(jax.random.key(1), keys, fitness(np.asarray(decoded)[:, 0]))

  def ours() -> None:
    nonlocal state
    state, offspring, masks, _ = evolution.ask(state, encoding, settings)
    state = evolution.tell(state, offspring, fitness(np.asarray(masks)[:, 0]), settings)

  runs: dict[str, Callable[[], object]] = {"population": ours}
  if theirs is not None:
    search = torch_search.Evolution(
      theirs, space, scores, RATIO, population=population, elites=elites
    )
    runs["torch"] = search.step
  seconds = in_turn(runs, rounds, pause)
  return {
    name: {
      "seconds": statistics.median(times),
      "time_relative_to_population": statistics.median(
        t / f for t, f in zip(times, seconds["population"], strict=True)
      ),
    }
    for name, times in seconds.items()
  }


def scaling(fitness: Fitness, masks: np.ndarray, rounds: int) -> dict:
  """Times of a quarter, half and all of the masks on a quarter, half and all of the images."""
  points = []
  parts = (0.25, 0.5, 1.0)
  for individuals, part in itertools.product((max(1, round(len(masks) * p)) for p in parts), parts):
    times, before, shape = [], fitness.forwards, (0, 0)
    for _ in range(rounds):
      start = time.perf_counter()
      shape = fitness.per_example(masks[:individuals], (0.0, part)).shape
      times.append(time.perf_counter() - start)
    work = (fitness.forwards - before) / rounds
    point = {"individuals": individuals, "images": shape[1], "work": work}
    points.append({**point, "seconds": statistics.median(times)})
  line = fit_line([p["work"] for p in points], [p["seconds"] for p in points])
  return {"points": points, **dataclasses.asdict(line)}


def show(name: str, document: dict, pretrained: bool) -> None:
  """Prints one model's results."""
  weights = "pretrained" if pretrained else "random weights"
  print(
    f"{name}, {weights}: {document['individuals']} individuals of {document['groups']} groups on "
    f"{document['images']} images in blocks of {document['block']}"
  )
  for way, row in document["speed"].items():
    line = f"  {way:12} {row['individuals_per_second']:8.2f} individuals/s"
    line += f", time / population {row['time_relative_to_population']:.2f}"
    print(line + (f" ({document['torch_layout']})" if way == "torch" else ""))
  for way, row in document["distance_differs"].items():
    print(
      f"  distances, {way}: relative difference {row['median']:.1e} (median image), "
      f"{row['mean']:.1e} (mean of all), {row['worst_individual']:.1e} (worst individual)"
    )
  for way, row in document["generation"].items():
    relative = f"time / population {row['time_relative_to_population']:.2f}"
    print(f"  one generation, {way}: {row['seconds']:.2f} s, {relative}")
  line = document["scaling"]
  for point in line["points"]:
    print(
      f"  {point['individuals']:4} individuals on {point['images']:4} images: "
      f"{point['seconds']:.3f} s"
    )
  print(
    f"  a line through these: {line['fixed']:.3f} s + {line['slope']:.3f} s for each individual on "
    f"all images; off by {line['residual']:.1%} at most",
  )
  print(
    f"  traced {document['traces']} time(s) before the first call, "
    f"{document['later_traces']} times after it",
    flush=True,
  )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--population", type=int, default=16)
  parser.add_argument("--images", type=int, help="other than each model's own number")
  parser.add_argument("--models", default=",".join(CASES), help="comma-separated")
  args = parser.parse_args(arguments)
  args.models = args.models.split(",")
  if unknown := [name for name in args.models if name not in CASES]:
    parser.error(f"--models: {', '.join(unknown)}; {', '.join(CASES)} are known")
  for name in ("rounds", "population", "images"):
    least = 2 if name == "population" else 1
    if (value := getattr(args, name)) is not None and value < least:
      parser.error(f"--{name}: {value}; at least {least} is accepted")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs all cases, prints them and writes JSON."""
  args = parse(arguments)
  torch = torch_search.available()
  if not torch:
    print("torch is not installed here: no torch rows (see the head of this script)", flush=True)
  results = {}
  for name in args.models:
    count, has_peer = CASES[name]
    count = args.images or count
    data = loading.has_data()
    loaded = loading.pretrained(name, count) if data else loading.random(name, count)
    load = os.getloadavg()[0]
    document = measure(
      loaded, population=args.population, rounds=args.rounds, peer=has_peer and torch
    )
    results[name] = {"pretrained": loaded.pretrained, "load_before": load, **document}
    show(name, document, loaded.pretrained)
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = process.describe() | {"torch": torch_search.version()}
    document = {"machine": machine, "rounds": args.rounds, "results": results}
    args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
  main()
