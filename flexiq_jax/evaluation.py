"""Top-1 accuracy over a stream of batches."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Array = Any


def top1(predict: Callable[[Array], Array], batches: Iterable[Any]) -> tuple[float, int]:
  """Share of examples whose largest logit is the label's.

  Args:
    predict: examples `[B, ...]` -> logits `[B, K]`.
    batches: objects with `images` `[B, ...]`, `labels` int `[B]` and `mask` bool `[B]` (false for
      padding); read one at a time.

  Returns:
    (top-1 in percent, number of examples).

  Raises:
    ValueError: no example, or logits that are not finite.
  """
  right = correct(predict, batches)
  return 100.0 * int(right.sum()) / len(right), len(right)


def correct(predict: Callable[[Array], Array], batches: Iterable[Any]) -> np.ndarray:
  """Which examples are classified rightly, bool `[n]`; arguments and errors of `top1`."""
  right, total = [], 0
  for batch in batches:
    logits = np.asarray(predict(batch.images))[batch.mask]
    if not np.isfinite(logits).all():
      raise ValueError(f"predict: logits are not finite behind example {total}")
    right.append(logits.argmax(axis=-1) == batch.labels[batch.mask])
    total += len(logits)
  if not total:
    raise ValueError("batches: no example to evaluate")
  return np.concatenate(right)
