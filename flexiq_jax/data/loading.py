"""Batches of preprocessed images, streamed from a source by a few threads.

Pillow decodes and resizes without the interpreter lock, so threads are enough. At most 64 images
(or two per thread) are decoded ahead of the one that is needed, whatever the size of the dataset.
"""

import collections
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from flexiq_jax.data.preprocess import Preprocess
from flexiq_jax.data.source import Source, is_integer

_MAX_THREADS = 16
_AHEAD = 64
_Example = tuple[np.ndarray, int, int]  # pixels uint8 [H, W, C], label, index


class Batch(NamedTuple):
  """A batch of fixed size, so that nothing is compiled again for the last one.

  Attributes:
    images: float32 [B, H, W, C], zero where mask is False.
    labels: int32 [B], zero where mask is False.
    mask: bool [B], False for padding.
  """

  images: np.ndarray
  labels: np.ndarray
  mask: np.ndarray


def batches(
  source: Source,
  preprocess: Preprocess,
  batch_size: int,
  *,
  indices: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
  """Iterates over a source once, in order.

  Args:
    source: the dataset.
    preprocess: what to do with each image; it has to give all images one shape.
    batch_size: B.
    indices: which examples, in which order; None is all of them.

  Returns:
    Iterator over ceil(N / B) batches, the last of them padded.

  Raises:
    ValueError: batch_size or an index is wrong, or an image does not decode or has another shape.
  """
  # The arguments are checked at the call, not at the first batch.
  raw = raw_batches(source, preprocess, batch_size, indices=indices)
  return (_pad(preprocess.normalize(images), labels, batch_size) for images, labels in raw)


def raw_batches(
  source: Source,
  preprocess: Preprocess,
  batch_size: int,
  *,
  indices: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Like `batches`, before normalisation: for a training step that augments 8-bit images.

  Args:
    source: as in `batches`.
    preprocess: as in `batches`.
    batch_size: B.
    indices: as in `batches`.

  Returns:
    Iterator over (images uint8 [b, H, W, C], labels int32 [b]); b = B but for the last one.

  Raises:
    ValueError: as `batches`.
  """
  if not is_integer(batch_size) or batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; a positive integer is accepted")
  order = _check_indices(source, indices)
  return _raw_batches(source, preprocess, batch_size, order)


def _raw_batches(
  source: Source, preprocess: Preprocess, batch_size: int, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  def read(index: int) -> _Example:
    image, label = source.item(index)
    try:
      return preprocess.geometry(image), label, index
    except ValueError as error:
      raise ValueError(f"example {index} of {source}: {error}") from error

  threads = min(_MAX_THREADS, os.cpu_count() or 1)
  window = max(2 * threads, min(batch_size, _AHEAD))
  shape = None
  examples = _ordered_map(read, (int(i) for i in order), threads, window)
  try:
    while chunk := list(itertools.islice(examples, batch_size)):
      for pixels, _, index in chunk:
        shape = shape or pixels.shape
        if pixels.shape != shape:
          raise ValueError(
            f"example {index} of {source} has shape {list(pixels.shape)} after preprocessing, the "
            f"first one {list(shape)}: set crop so that all images get one shape"
          )
      yield np.stack([c[0] for c in chunk]), np.asarray([c[1] for c in chunk], np.int32)
  finally:
    examples.close()


def _ordered_map(
  read: Callable[[int], _Example], indices: Iterable[int], threads: int, window: int
) -> Generator[_Example, None, None]:
  """`map(read, indices)` by threads, at most `window` results ahead."""
  pending: collections.deque[Future] = collections.deque()
  pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
  try:
    for index in indices:
      pending.append(pool.submit(read, index))
      if len(pending) >= window:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    # Reached too when the consumer stops early or an image fails.
    pool.shutdown(wait=True, cancel_futures=True)


def _pad(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
  missing = batch_size - len(labels)
  mask = np.arange(batch_size) < len(labels)
  if missing:
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = np.concatenate([labels, np.zeros(missing, labels.dtype)])
  return Batch(images, labels, mask)


def _check_indices(source: Source, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
  if indices is None:
    return np.arange(len(source))
  order = np.asarray(indices)
  if order.ndim != 1 or not order.size or not np.issubdtype(order.dtype, np.integer):
    raise ValueError(
      f"indices are {order.dtype} {list(order.shape)}; a non-empty list of integers is accepted"
    )
  outside = order[(order < 0) | (order >= len(source))]
  if outside.size:
    raise ValueError(f"index {outside[0]} is outside 0..{len(source) - 1} of {source}")
  return order
