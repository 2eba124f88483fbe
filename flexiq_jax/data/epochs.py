"""Shuffled passes over a training set, from memory where it is small."""

from collections.abc import Iterator

import numpy as np

from flexiq_jax.data.loading import raw_batches
from flexiq_jax.data.preprocess import Preprocess
from flexiq_jax.data.source import Source

# A training set whose 8-bit pixels fit into this many bytes is decoded once: CIFAR takes 150 MB.
MEMORY_BUDGET = 256 * 2**20
_DECODE_BATCH = 256


class Epochs:
  """Full batches of 8-bit images in an order that depends on (seed, epoch) only."""

  def __init__(
    self,
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    indices: np.ndarray,
    seed: int,
    memory_budget: int = MEMORY_BUDGET,
  ):
    """Looks at one image to learn the size of all; decodes the others when they are needed.

    Args:
      source: the dataset.
      preprocess: gives all images one shape; its normalisation is left to the training step.
      batch_size: B.
      indices: the examples to train on, integers [N], N >= B.
      seed: of the order, a non-negative integer.
      memory_budget: bytes; a training set with more bytes of pixels is decoded anew every epoch.
    """
    self._source, self._preprocess = source, preprocess
    self._batch_size, self._indices, self._seed = batch_size, indices, seed
    first = preprocess.geometry(source.image(int(indices[0])))
    self._shape = first.shape
    self.in_memory = first.nbytes * len(indices) <= memory_budget
    self._decoded: tuple[np.ndarray, np.ndarray] | None = None

  @property
  def steps(self) -> int:
    """Batches in an epoch; the incomplete last one is left out."""
    return len(self._indices) // self._batch_size

  def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates over one epoch.

    Args:
      epoch: its number; the same number gives the same order.

    Returns:
      Iterator over (images uint8 [B, H, W, C], labels int32 [B]).

    Raises:
      ValueError: an image does not decode or has another shape than the first.
    """
    order = np.random.default_rng((self._seed, epoch)).permutation(len(self._indices))
    order = order[: self.steps * self._batch_size]
    if not self.in_memory:
      indices = self._indices[order]
      yield from raw_batches(self._source, self._preprocess, self._batch_size, indices=indices)
      return
    images, labels = self._decoded = self._decoded or self._decode()
    for rows in order.reshape(self.steps, self._batch_size):
      yield images[rows], labels[rows]

  def _decode(self) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(self._indices), *self._shape), np.uint8)
    labels = np.empty(len(self._indices), np.int32)
    start = 0
    for pixels, some in raw_batches(
      self._source, self._preprocess, _DECODE_BATCH, indices=self._indices
    ):
      images[start : start + len(some)] = pixels
      labels[start : start + len(some)] = some
      start += len(some)
    return images, labels
