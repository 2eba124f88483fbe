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
    x: inputs `[n, ...]`, prepared as for evaluation.
    labels: int `[n]`.
  """

  x: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.x)


def cross_entropy(z: Array, labels: Array) -> Array:
  """Of logits `[n, K]` and labels int `[n]`, float32 `[n]`."""
  return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=-1)[:, 0]


def blocks(x: Array, labels: Array, block: int) -> Iterator[tuple[float, Array, Array, np.ndarray]]:
  """Blocks of one size; the last one repeats examples, so that no other shape is compiled.

  Args:
    x: `[n, ...]`.
    labels: int `[n]`.
    block: examples in a block.

  Yields:
    (share that is done with it, inputs, labels, which of them count).

  Raises:
    ValueError: arrays that do not fit, or no example in a block.
  """
  x, labels = np.asarray(x), np.asarray(labels)
  if not len(x) or labels.shape != x.shape[:1] or block < 1:
    raise ValueError(
      f"x, labels, block: {list(x.shape)}, {list(labels.shape)}, {block}; expected "
      "[n, ...], [n] and blocks of at least one example"
    )
  size = min(block, len(x))
  for start in range(0, len(x), size):
    rows = np.arange(start, start + size)
    used, rows = rows < len(x), rows % len(x)
    done = min(1.0, (start + size) / len(x))
    yield done, jnp.asarray(x[rows]), jnp.asarray(labels[rows], jnp.int32), used
