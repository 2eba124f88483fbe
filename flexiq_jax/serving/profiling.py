"""Measures a latency profile of a deployed model on the present device."""

import datetime
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import jax
import numpy as np

from flexiq_jax.deployment import Runner
from flexiq_jax.runs.progress import Progress
from flexiq_jax.serving.profile import Profile


def runner_function(runner: Runner) -> Callable[[np.ndarray, float], np.ndarray]:
  """A runner as a function of a batch and its ratio, which returns when the result is there.

  Args:
    runner: of the model; call the function from one thread only.

  Returns:
    `run(x [n, ...], ratio) -> y [n, ...]`, NumPy arrays.
  """

  def run(x: np.ndarray, ratio: float) -> np.ndarray:
    runner.switch(ratio)
    return np.asarray(jax.block_until_ready(runner(x)))

  return run


def measure(
  run: Callable[[np.ndarray, float], np.ndarray],
  example: np.ndarray,
  *,
  sizes: Sequence[int],
  ratios: Sequence[float],
  repeats: int = 20,
  model: str = "",
  clock: Callable[[], float] = time.perf_counter,
) -> Profile:
  """Times `run` at all sizes and ratios.

  Ratios take turns, so that a machine that slows down slows all of them; the first turn of a size
  compiles and is not counted.

  Args:
    run: as `runner_function` makes it; copies to and from the device are part of what is timed.
    example: `[...]` one input.
    sizes: batch sizes, those that the runner compiles.
    ratios: 4-bit ratios, the model's levels.
    repeats: timed batches for each size and ratio. p99 is the largest below 100 of them.
    model: its name, for the file.
    clock: seconds.

  Raises:
    ValueError: `repeats` is below 2.
  """
  if repeats < 2:
    raise ValueError(f"repeats: {repeats}; 2 or more is accepted")
  sizes, ratios = sorted(set(sizes)), sorted(set(ratios))
  seconds = np.zeros((len(sizes), len(ratios), repeats))
  with Progress("profile, batches", len(sizes) * (repeats + 1)) as progress:
    for i, size in enumerate(sizes):
      x = np.stack([example] * size)
      for turn in range(-1, repeats):
        for j, ratio in enumerate(ratios):
          started = clock()
          run(x, ratio)
          if turn >= 0:
            seconds[i, j, turn] = clock() - started
        progress.update()
  p50, p99 = np.percentile(seconds, (50, 99), axis=-1, method="higher")
  return Profile(
    sizes=tuple(sizes),
    ratios=tuple(ratios),
    p50=p50,
    p99=p99,
    source="measured",
    device=jax.devices()[0].device_kind,
    model=model,
    versions={name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    note=f"{repeats} batches each",
  )
