"""What is finetuned on: examples in memory, and the batches that are drawn from them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

Array = Any
# (key, examples of a batch) -> the model's input.
Prepare = Callable[[jax.Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Examples:
  """What is trained on, in memory; batches depend on (seed, number) only.

  Attributes:
    inputs: `[n, ...]`, training data.
    labels: int `[n]`, or None.
    prepare: makes the model's input of a batch, with a random key: augmentation, normalisation.
  """

  inputs: Array
  labels: Array | None = None
  prepare: Prepare = lambda key, x: x


@dataclasses.dataclass(frozen=True)
class Batches:
  """`loop.Data`: so many batches an epoch, drawn without replacement from pass to pass."""

  examples: Examples
  batch_size: int
  steps: int
  seed: int
  sharding: Any

  def epoch(self, epoch: int) -> Iterator[Any]:
    first = (epoch - 1) * self.steps
    for step in range(first, first + self.steps):
      rows = self._rows(step)
      labels = self.examples.labels
      batch = self.examples.inputs[rows], None if labels is None else labels[rows]
      yield batch if self.sharding is None else jax.device_put(batch, self.sharding)

  def _rows(self, step: int) -> np.ndarray:
    n = len(self.examples.inputs)
    per_pass = n // self.batch_size
    order = np.random.default_rng((self.seed, step // per_pass)).permutation(n)
    start = step % per_pass * self.batch_size
    return np.sort(order[start : start + self.batch_size])


def examples_mesh(batch_size: int) -> Mesh | None:
  """All devices of this process, which share a batch; None where that gives nothing."""
  devices = jax.local_devices()
  fits = len(devices) > 1 and batch_size % len(devices) == 0
  return Mesh(np.array(devices), ("examples",)) if fits else None
