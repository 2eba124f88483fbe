"""Individuals a second of a search's fitness, beside PyTorch on the same device, one at a time.

| way | what it does |
|---|---|
| `ours ...` | `search.Fitness` in each of its forms and widths (`forms`) |
| `torch` | benchmarks/torch_search.py: one model, hooks, exchanged weights; float32 |
| `torch_tf32` | as torch does it by itself on a GPU: convolutions of rounded operands |

ResNet-20 on 32 x 32 images; pretrained where its files are, else random weights, which are as
fast. Ways run in turn; ratios are of the same round. `forward` counts images that passed a mixed
model in a second, `backward` images of the forward and backward passes that make the quadratic
model. `torch_tf32` computes other distances.
"""

import concurrent.futures
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import loading, population, torch_search
from benchmarks.device import main_job, present, timing
from benchmarks.device.context import Context, claim
from flexiq_jax import orders
from flexiq_jax.orders import Schedule
from flexiq_jax.runs import process
from flexiq_jax.search import Fitness, gram

GOAL = 3.0  # times the peer's individuals a second
BACKWARD = 20.0  # seconds that the backward passes are left, compilation included


def forms(platform: str, images: int) -> dict[str, dict[str, Any]]:
  """Name -> arguments of `Fitness`: the ways to evaluate a population that are worth comparing.

  The first is what a search takes by itself. Blocks are whole sets of images where an individual
  runs alone, and smaller where several do.
  """
  few = min(64, images)
  found: dict[str, dict[str, Any]] = {"default": {"block": few}}
  found["loop"] = {"form": "loop", "block": images}
  if platform == "cpu":
    return found
  for form in ("masks", "split"):
    for width in (4, 16):
      found[f"{form}, width {width}"] = {"form": form, "width": width, "block": few}
  return found


def run(context: Context) -> dict[str, Any]:
  """Builds every way, then times them in turn until the time box is over."""
  platform = present.device(context).platform
  process.full_precision()  # as a search by run.py has it
  images, individuals = (8, 4) if context.small else (256, 16)
  loaded = load(context.small, images)
  drawn = [orders.random(loaded.space, seed) for seed in range(individuals)]
  masks = np.stack([Schedule(loaded.space, order).mask(0.5) for order in drawn])
  result: dict[str, Any] = {
    "model": "resnet20",
    "pretrained": loaded.pretrained,
    "images": images,
    "individuals": individuals,
    "groups": loaded.space.total,
    "refused": {},
  }
  ways, kept = build(context, loaded, platform, images, individuals, result)
  found: dict[str, np.ndarray] = {}
  for name, way in list(ways.items()):
    try:
      found[name] = way(masks)
    except Exception as error:  # one way that does not run must not cost the others
      result["refused"][name] = timing.reason(error)
      del ways[name]
  compare(result, found)
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  context.save(finished(result, seconds))
  end = time.monotonic() + max(3.0, context.left() - BACKWARD)
  for number in range(20):
    if number >= 2 and (time.monotonic() > end or context.small):
      break
    for name, way in ways.items():
      start = time.perf_counter()
      way(masks)
      seconds[name].append(time.perf_counter() - start)
    context.save(finished(result, seconds))
  measure_backward(context, loaded, kept, result)
  return finished(result, seconds)


def load(small: bool, images: int) -> loading.Loaded:
  """ResNet-20: pretrained where there are files and a reader of configs."""
  if small:
    return loading.random("resnet20", images, depths=(1, 1), width=8, input_size=8)
  there = loading.has_data() and main_job.real_data() is not None
  if there and importlib.util.find_spec("ml_collections") is not None:
    return loading.pretrained("resnet20", images)
  return loading.random("resnet20", images)


def build(
  context: Context, loaded, platform: str, images: int, individuals: int, result: dict[str, Any]
) -> tuple[dict[str, Callable[[np.ndarray], np.ndarray]], list[Fitness]]:
  """Compiles all forms side by side, then makes the peers.

  Returns:
    Name -> masks to distances, and the forms that were built.
  """
  ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
  fitness: list[Fitness] = []
  make = functools.partial(
    Fitness, loaded.network, loaded.model, loaded.space, loaded.images, capacity=individuals
  )
  memory = 4.0 if platform == "cpu" else 12.0
  threads = 1 if platform == "cpu" else 6
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  started = {
    pool.submit(make, memory=memory, **arguments): (name, arguments)
    for name, arguments in forms(platform, images).items()
  }
  try:
    # Half of what is left: those that are not compiled by then are left out.
    for future in concurrent.futures.as_completed(started, timeout=max(5.0, context.left() / 2)):
      name, arguments = started[future]
      if (error := future.exception()) is not None:
        result["refused"][f"ours {name}"] = timing.reason(error)
        continue
      one = future.result()
      fitness.append(one)
      ways[f"ours {name}"] = one.per_example
      result.setdefault("forms", {})[name] = {**arguments, "width": one.width, "block": one.block}
  except TimeoutError:
    late = [name for future, (name, _) in started.items() if not future.done()]
    result["refused"] |= {f"ours {name}": "it was not compiled in time" for name in late}
  pool.shutdown(wait=False, cancel_futures=True)
  if not torch_search.available():
    result["refused"]["torch"] = "torch is not installed"
    return ways, fitness
  device = "cuda" if platform == "gpu" else "cpu"
  for name, tf32 in {"torch": False, "torch_tf32": True}.items():
    if tf32 and device == "cpu":
      continue
    try:
      peer = torch_search.TorchFitness(
        *(loaded.network, loaded.model, loaded.space, loaded.images), device=device, tf32=tf32
      )
    except Exception as error:
      result["refused"][name] = timing.reason(error)
      continue
    ways[name] = peer.per_image
    result.setdefault("layouts", {})[name] = peer.layout
  return ways, fitness


def compare(result: dict[str, Any], found: dict[str, np.ndarray]) -> None:
  """Notes by how much distances differ from those of the first of our forms."""
  ours = [name for name in found if name.startswith("ours")]
  if not ours:
    return
  first = found[ours[0]]
  differs = {}
  for name, values in found.items():
    relative = np.abs(values - first) / np.maximum(np.abs(first), 1e-30)
    means = np.abs(values.mean(axis=1) / first.mean(axis=1) - 1)
    differs[name] = {"median": float(np.median(relative)), "worst_individual": float(means.max())}
  result["distance_differs"] = differs
  result["same_network"] = {
    name: one["median"] < population.TOLERANCE for name, one in differs.items()
  }


def measure_backward(context: Context, loaded, fitness: list[Fitness], result: dict) -> None:
  """Times the passes that make the quadratic model."""
  if not fitness or context.left() < 8:
    return
  try:
    influence = gram.Influence(
      fitness[0],
      gram.Ties(loaded.space, loaded.scores, 4096),
      probes=2,
      block=min(64, fitness[0].examples),
    )
    base = np.zeros(loaded.space.total, bool)
    times = []
    for number in range(3):
      start = time.perf_counter()
      influence.measure(jax.random.key(number), base)
      times.append(time.perf_counter() - start)
    # Each probe is a forward and a backward pass over all images; the first time compiles.
    result["backward"] = 2 * fitness[0].examples / statistics.median(times[1:])
  except Exception as error:
    result["refused"]["backward"] = timing.reason(error)


def finished(result: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
  """The result with rates, ratios and claims."""
  individuals, images = result["individuals"], result["images"]
  speed = {
    name: {
      "individuals_per_second": individuals / statistics.median(times),
      "forward": individuals * images / statistics.median(times),
      "rounds": len(times),
    }
    for name, times in seconds.items()
    if times
  }
  claims = []
  if ours := [name for name in speed if name.startswith("ours")]:
    best = max(ours, key=lambda name: speed[name]["individuals_per_second"])
    rate = lambda name: speed[name]["individuals_per_second"]
    result = result | {"best": best}
    told = ", ".join(f"{name.removeprefix('ours ')} {rate(name):.1f}" for name in ours)
    claims.append(claim("search, ResNet-20: individuals a second by form", told))
    claims.append(
      claim("search, ResNet-20: mixed forward passes", f"{rate(best) * images:,.0f} images/s")
    )
    for name in speed:
      if name in ours:
        continue
      speed[name]["ours_faster"] = timing.ratio(seconds[name], seconds[best])
      same = result.get("same_network", {}).get(name, True)
      told = (
        f"{speed[name]['ours_faster']:.1f}x ({best.removeprefix('ours ')}, {rate(name):.1f}/s there"
      )
      told += "" if same else "; its distances are others"
      claims.append(claim(f"search, ResNet-20: individuals a second against {name}", told + ")"))
  if "backward" in result:
    told = f"{result['backward']:,.0f} images/s"
    claims.append(claim("search, ResNet-20: forward and backward passes", told))
  return result | {"speed": speed, "goal": GOAL, "claims": claims}
