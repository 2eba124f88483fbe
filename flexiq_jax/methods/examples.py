"""Labelled examples that methods measure on, and the loss of a model on them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


@dataclasses.dataclass(frozen=True)
class Examples:
  """Labelled training examples.

  Attributes:
    x: inputs `[n, ...]`, prepared as for evaluation; n > 0.
    labels: int `[n]`.

  Raises:
    ValueError: arrays that do not fit.
  """

  x: np.ndarray
  labels: np.ndarray

  def __post_init__(self):
    if not len(self.x) or self.labels.shape != self.x.shape[:1]:
      shapes = f"{list(self.x.shape)}, {list(self.labels.shape)}"
      raise ValueError(f"x, labels: {shapes}; expected [n, ...], [n], n > 0")

  def __len__(self) -> int:
    return len(self.x)

  def blocks(self, block: int) -> Iterator[tuple[Array, Array, np.ndarray]]:
    """Blocks of one size; the last one repeats examples, so that no other shape is compiled.

    Args:
      block: examples in a block; less where there are not so many.

    Yields:
      (inputs, labels int32, which of them count).
    """
    size = min(block, len(self))
    for start in range(0, len(self), size):
      rows = np.arange(start, start + size)
      used, rows = rows < len(self), rows % len(self)
      yield jnp.asarray(self.x[rows]), jnp.asarray(self.labels[rows], jnp.int32), used


def cross_entropy(z: Array, labels: Array) -> Array:
  """Of logits `[n, K]` and labels int `[n]`, float32 `[n]`."""
  return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=-1)[:, 0]
