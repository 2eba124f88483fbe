"""Runs a deployed model on batches of any size, at a ratio that changes between them.

Batches are padded to the next of a few sizes, so that there is one executable for each of these and
none for anything else: neither a new ratio nor a new batch size compiles.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.deployment.model import Deployed, apply
from flexiq_jax.deployment.place import place
from flexiq_jax.kernels import tile_files

Array = Any
SIZES = (1, 8, 32, 128)


class Runner:
  """A deployed model and its present ratio; call it as `runner(x)`.

  Threads may call and switch at once: a call takes the level once, for all parts of its batch.

  Attributes:
    traces: how often the model was traced, once for each size in use.
  """

  def __init__(
    self,
    deployed: Deployed,
    *,
    sizes: Sequence[int] = SIZES,
    implementation: str | None = None,
    tuning: str | os.PathLike[str] | None = None,
    platform: str | None = None,
    kind: str | None = None,
  ) -> None:
    """Starts at the first level.

    Args:
      deployed: the model.
      sizes: batch sizes that are compiled, each at its first use; larger batches run in parts.
      implementation: of the mixed matmul (see `kernels.mixed_matmul`).
      tuning: folder of measured tiles (see `kernels.tile_files`); None takes those that come with
        the project for this kind of device, where there are any; `rule` takes tiles by rule.
      platform: cpu, gpu or tpu, for which the model is compiled; None is JAX's default backend.
      kind: the TPU that kernels are compiled for (see `kernels.mixed_matmul`).

    Raises:
      ValueError: sizes that are no positive integers, or no tiles of this device in the folder.
    """
    if not sizes or any(type(n) is not int or n < 1 for n in sizes):
      raise ValueError(f"sizes: {sizes}; positive integers are accepted")
    tuned = tile_files.shipped() if tuning is None and platform is None else {}
    if tuning is not None and tuning != "rule":
      tuned = tile_files.read(tuning)
    self._sizes = tuple(sorted(set(sizes)))
    self._deployed = place(deployed, platform, implementation)
    self.traces = 0

    @jax.jit
    def run(deployed, x, level):
      self.traces += 1
      where = {"implementation": implementation, "platform": platform, "kind": kind}
      return apply(deployed, x, level, **where, tuned=tuned)

    self._run = run
    self._levels = np.asarray(deployed.levels)
    # All levels lie on the device, so that a switch copies nothing.
    self._numbers = [jax.device_put(np.int32(i)) for i in range(len(self._levels))]
    self.switch(float(self._levels[0]))

  def __repr__(self) -> str:
    levels = ", ".join(f"{100 * level:g}" for level in self._levels)
    return f"Runner(at {100 * self.ratio:g} % of {levels}; batches of {self._sizes})"

  @property
  def ratio(self) -> float:
    """The level that runs."""
    return float(self._levels[self._present[0]])

  def switch(self, ratio: float) -> None:
    """Goes to the first level that reaches a ratio; from the next batch on.

    Raises:
      ValueError: no number, one outside 0..1, or one above the last level.
    """
    try:
      fine = 0 <= ratio <= 1
    except TypeError:
      fine = False
    number = int(np.searchsorted(self._levels, np.float32(ratio) - 1e-6)) if fine else -1
    if not 0 <= number < len(self._levels):
      raise ValueError(f"ratio: {ratio!r}; a number in 0..{self._levels[-1]:g} is accepted")
    self._present = number, self._numbers[number]  # both at once, for threads

  def wait(self) -> None:
    """Waits until the last switch has reached the device."""
    self._present[1].block_until_ready()

  def __call__(self, x: Array) -> Any:
    """The model's result for a batch `[B, ...]` of any size, all of it at one level.

    One of a compiled size is taken as it is; if it lies on the device, nothing is copied. An empty
    batch has an empty result. Codes of inputs that are not finite are undefined, and so are the
    results of those examples; others are not touched.
    """
    largest, level = self._sizes[-1], self._present[1]
    x = x if hasattr(x, "shape") else np.asarray(x)
    if len(x) in self._sizes:
      return self._run(self._deployed, x, level)
    starts = range(0, max(1, len(x)), largest)
    parts = [self._padded(x[start : start + largest], level) for start in starts]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *p: jnp.concatenate(p), *parts)

  def _padded(self, x: Array, level: Array) -> Any:
    size = bucket(max(1, len(x)), self._sizes)
    full = np.zeros((size, *x.shape[1:]), np.asarray(x).dtype)
    full[: len(x)] = x
    y = self._run(self._deployed, full, level)
    return jax.tree.map(lambda a: a[: len(x)], y)


def bucket(n: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds n examples.

  Raises:
    ValueError: there is none.
  """
  if not 0 < n <= max(sizes):
    raise ValueError(f"n: a batch of {n}; 1..{max(sizes)} is accepted")
  return min(size for size in sizes if size >= n)
