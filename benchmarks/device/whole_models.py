"""Whole deployed models: latency by batch and ratio, the time of a switch, memory; and the profile.

| figure | what |
|---|---|
| `p50_us`, `p99_us` | `runner(x)` on images in the host's memory, until logits are there |
| `device_p50_us`, `device_p99_us` | the same with images that lie on the device, until it is done |
| `queued_us` | of a batch when batches on the device follow each other |

All ratios of a batch run in turn, round by round. Weights are random (`prepare.py`), so no accuracy
belongs to this. Percentiles are of as many calls as `calls` says: of fewer than 100, p99 is the
largest but for interpolation.
"""

import concurrent.futures
import datetime
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.device import prepare, present, profiles, records, shapes, timing
from benchmarks.device.context import Context, Skipped, claim
from experiments.deploy import switch_cost
from flexiq_jax import deployment
from flexiq_jax.deployment import artifact
from flexiq_jax.kernels import tile_files

HOW = (
  "deployment.Runner on one device, wall clock, random weights: p50_us and p99_us from images on "
  "the host to logits on the host, device_* from images on the device to its being done, queued_us "
  "a batch when batches follow each other; all ratios in turn"
)
ORDER = (8, 1, 128, 32)  # batches, most important first


def run(context: Context) -> dict[str, Any]:
  """Measures model after model, each at all batches that are compiled in time."""
  device, tuned = present.device(context), "tuned" in context.options
  tuning = str(context.folder / "tiles") if tuned else "rule"
  if tuned:
    try:
      tile_files.read(tuning)
    except ValueError as error:
      raise Skipped(f"no measured tiles: {error}") from error
  batches = (1,) if context.small else ORDER[:2] if tuned else ORDER
  machine = context.earlier("machine")
  result: dict[str, Any] = {
    "models": {},
    "refused": {},
    "tiles": "measured" if tuned else "by rule",
  }
  name_of_profile = "profile_tuned.json" if tuned else "profile.json"
  names = list(shapes.NAMES)
  for number, name in enumerate(names):
    seconds = context.left() / (len(names) - number)
    if seconds < 3 and not context.small:
      result["refused"][name] = "no time was left"
      continue
    try:
      deployed = load(context, name, device, wait=context.left() / 2)
      measure(context, result, name, deployed, tuning, batches, seconds)
    except Exception as error:
      result["refused"][name] = timing.reason(error)
      print(f"{name}: {timing.reason(error)}", flush=True)
    records.write(
      context.folder / name_of_profile, profiles.to_dict(profile(result, machine, device))
    )
    context.save(finished(result))
  return finished(result) | {"complete": not result["refused"]}


def load(context: Context, name: str, device: Any, wait: float) -> deployment.Deployed:
  """A model that `prepare` made; a trial makes it here."""
  if context.small:
    return prepare.build(name, device.platform, device.device_kind, small=True)
  end = time.monotonic() + wait
  while not (context.folder / "models" / f"{name}.json").is_file():
    if time.monotonic() > end:
      raise RuntimeError("it was not prepared in time (see prepare.log)")
    time.sleep(0.2)
  return artifact.load(prepare.folder_of(context.folder, name), *shapes.abstract(name))


def measure(
  context: Context,
  result: dict[str, Any],
  name: str,
  deployed: deployment.Deployed,
  tuning: str,
  batches: tuple[int, ...],
  seconds: float,
) -> None:
  """Compiles all batches side by side, then measures each; rows are kept as they come."""
  end = time.monotonic() + seconds
  *_, x = shapes.abstract(name, context.small)
  memory = vars(deployment.sizes(deployed, x))
  runner = deployment.Runner(deployed, sizes=batches, tuning=tuning)
  model: dict[str, Any] = {"latency": [], "refused": {}, "memory": memory}
  result["models"][name] = model
  rng = np.random.default_rng(0)
  images = {b: rng.normal(size=(b, *x.shape[1:])).astype(np.float32) for b in batches}
  ready = warm(runner, images, model["refused"], seconds * 0.75)
  for number, batch in enumerate(ready):
    each = max(0.5, (end - time.monotonic()) / (len(ready) - number) - 0.2)
    model["latency"] += rows(runner, images[batch], each, 2 if context.small else 60)
    context.save(finished(result))
  cost = switch_cost(runner, shapes.LEVELS, 100 if context.small else 2000)
  model["switch_us"] = {"p50": cost["p50"], "p99": cost["p99"], "switches": cost["switches"]}
  model["traces"] = runner.traces
  stats = jax.devices()[0].memory_stats() or {}
  in_use = {key: stats[key] for key in ("bytes_in_use", "peak_bytes_in_use") if key in stats}
  model["memory"] = memory | in_use
  show(name, model)


def warm(
  runner: deployment.Runner, images: dict[int, Any], refused: dict, seconds: float
) -> list[int]:
  """Compiles; the batches that are ready in time, in their order."""
  pool = concurrent.futures.ThreadPoolExecutor(len(images))
  started = {
    b: pool.submit(lambda x=x: jax.block_until_ready(runner(x))) for b, x in images.items()
  }
  concurrent.futures.wait(started.values(), timeout=max(1.0, seconds))
  for batch, future in started.items():
    if not future.done():
      refused[str(batch)] = "it was not compiled in time"
    elif (error := future.exception()) is not None:
      refused[str(batch)] = timing.reason(error)
  pool.shutdown(wait=False, cancel_futures=True)
  return [batch for batch in images if str(batch) not in refused]


def rows(
  runner: deployment.Runner, images: np.ndarray, seconds: float, rounds: int
) -> list[dict[str, Any]]:
  """Latencies of one batch at all ratios, in at least two rounds and at most `rounds`."""
  there = jax.block_until_ready(jax.device_put(images))
  kinds = ("host", "device", "queued")
  times: dict[float, dict[str, list[float]]] = {r: {k: [] for k in kinds} for r in shapes.LEVELS}
  end, number = time.monotonic() + seconds, 0
  while number < 2 or (number < rounds and time.monotonic() < end):
    number += 1
    for ratio, found in times.items():
      runner.switch(ratio)
      runner.wait()
      for _ in range(2):
        found["host"].append(_timed(lambda: np.asarray(runner(images))))
      for _ in range(4):
        found["device"].append(_timed(lambda: jax.block_until_ready(runner(there))))
      queue = lambda: jax.block_until_ready([runner(there) for _ in range(8)])
      found["queued"].append(_timed(queue) / 8)
  made = []
  for ratio, found in times.items():
    host, device = (timing.percentiles(found[kind]) for kind in ("host", "device"))
    row = {"batch": len(images), "ratio": ratio, **host}
    row |= {f"device_{key}": value for key, value in device.items()}
    made.append(row | {"queued_us": 1e6 * statistics.median(found["queued"])})
  return made


def _timed(call: Any) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def profile(result: dict[str, Any], machine: dict[str, Any], device: Any) -> profiles.Profile:
  """The profile of what is measured so far."""
  versions = {k: machine.get(k) for k in ("jax", "jaxlib", "python", "commit") if k in machine}
  return profiles.Profile(
    version=profiles.VERSION,
    device=device.device_kind,
    platform=device.platform,
    made="measured",
    date=datetime.date.today().isoformat(),
    how=HOW,
    versions=versions,
    tiles=result["tiles"],
    models={name: model for name, model in result["models"].items() if model["latency"]},
  )


def show(name: str, model: dict[str, Any]) -> None:
  """Prints a model's latencies."""
  for row in model["latency"]:
    print(
      f"{name} batch {row['batch']} at {row['ratio']:.0%}: p50 {row['p50_us']:.0f} us, p99 "
      f"{row['p99_us']:.0f} us; on the device {row['device_p50_us']:.0f} us, queued "
      f"{row['queued_us']:.0f} us",
      flush=True,
    )
  print(
    f"{name}: a switch takes {model['switch_us']['p50']:.1f} us; {model['refused']}", flush=True
  )


def finished(result: dict[str, Any]) -> dict[str, Any]:
  """The result with its claims."""
  tiles, claims = result["tiles"], []
  for name, model in result["models"].items():
    by = {(row["batch"], row["ratio"]): row for row in model["latency"]}
    for batch in sorted({batch for batch, _ in by}):
      ends = by.get((batch, 0.0)), by.get((batch, 1.0))
      eight, four = ends
      if eight is None or four is None:
        continue
      told = (
        f"p50 {eight['p50_us'] / 1e3:.2f} ms in 8 bits, {four['p50_us'] / 1e3:.2f} in 4; on the "
        f"device {eight['queued_us'] / 1e3:.3f} and {four['queued_us'] / 1e3:.3f}"
      )
      claims.append(claim(f"{name}, batch {batch}, tiles {tiles}", told))
    if "switch_us" in model:
      told = f"p50 {model['switch_us']['p50']:.1f} us, p99 {model['switch_us']['p99']:.1f} us"
      claims.append(claim(f"{name}: switch of the ratio", told))
      claims.append(
        claim(f"{name}: weights on the device", f"{model['memory']['device'] / 2**20:.0f} MiB")
      )
  return result | {"claims": claims}
