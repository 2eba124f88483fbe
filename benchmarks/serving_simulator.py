"""Requests that the simulator serves in a second, beside a peer that handles events.

The peer (`benchmarks/serving_events.py`) makes the same decisions by the same functions, but
keeps a list of requests and handles one arrival at a time. Both results are compared. Seconds are
of wall time, and of this process's CPU time, which says more where others use the machine.

    PYTHONPATH=. python benchmarks/serving_simulator.py
    PYTHONPATH=. python benchmarks/serving_simulator.py --json=build/serving_simulator.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving_events import event_by_event
from flexiq_jax import serving
from flexiq_jax.runs import files
from flexiq_jax.serving import workloads

LOADS = (0.1, 0.5, 0.9, 1.2)  # of what INT8 sustains


def measure(seconds: float, rounds: int, peer: Callable[..., Any] | None) -> list[dict[str, Any]]:
  """One row for each load and controller.

  Args:
    seconds: span of the arrivals.
    rounds: timed runs; the median counts.
    peer: `event_by_event`, or None.
  """
  profile = serving.modelled(int8=1250)
  batching = serving.Batching(size=128)
  rows = []
  for load in LOADS:
    arrivals = workloads.poisson(load * profile.throughput(0.0), seconds, 0)
    for name in ("fixed", "load"):
      options: dict[str, Any] = {"ratio": 0.0} if name == "fixed" else {}
      controller = serving.create(name, profile, target=0.2, **options)
      ours = lambda c=controller, a=arrivals: serving.simulate(
        a, c, profile=profile, batching=batching
      )
      record, took, cpu = _timed(ours, rounds)
      batches = int(record.batch.max()) + 1
      row: dict[str, Any] = {
        "load": load,
        "controller": name,
        "requests": len(arrivals),
        "batches": batches,
      }
      row |= {"per_second": len(arrivals) / took, "per_cpu_second": len(arrivals) / cpu}
      row["batches_per_second"] = batches / took
      if peer is not None:
        part = arrivals[: min(len(arrivals), 20_000)]
        plain, slow, _ = _timed(lambda: peer(part, controller, profile, batching, 1024, None), 1)
        again = serving.simulate(part, controller, profile=profile, batching=batching)
        if not np.array_equal(plain[4], again.batch):
          raise RuntimeError(f"{name} at {load}: the peer forms other batches")
        row["relative_to_peer"] = row["per_second"] / (len(part) / slow)
      rows.append(row)
  return rows


def _timed(call: Callable[[], Any], rounds: int) -> tuple[Any, float, float]:
  """The result, and seconds of wall and of CPU time, medians over rounds."""
  times, result = [], None
  for _ in range(rounds):
    started = time.perf_counter(), time.process_time()
    result = call()
    times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
  wall, cpu = np.median(times, axis=0)
  return result, float(wall), float(cpu)


def main(argv: list[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seconds", type=float, default=200.0, help="span of the arrivals")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--no-peer", action="store_true")
  parser.add_argument("--json", type=Path)
  given = parser.parse_args(argv)
  if given.rounds < 1 or given.seconds <= 0:
    parser.error("--rounds, --seconds: positive numbers are accepted")
  rows = measure(given.seconds, given.rounds, None if given.no_peer else event_by_event)
  for row in rows:
    beside = f", {row['relative_to_peer']:.1f}x the peer" if "relative_to_peer" in row else ""
    print(
      f"load {row['load']:g}, {row['controller']}: {row['per_second']:,.0f} requests/s, "
      f"{row['per_cpu_second']:,.0f} by CPU time; {row['batches_per_second']:,.0f} batches/s"
      f"{beside}"
    )
  if given.json:
    files.write_text(given.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
  main()
