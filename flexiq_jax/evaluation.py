"""Top-1 accuracy over a stream of batches."""

from collections.abc import Callable, Iterable, Sequence
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


def paired_difference(pairs: Sequence[Sequence[Array]]) -> tuple[float, float | None]:
  """Top-1 of one method above another's on the same examples, over several runs.

  Args:
    pairs: of each run, bool `[n]` twice: which examples the one and the other got right. The runs
      share the examples, so an example counts with its mean over them.

  Returns:
    Points, and their standard error over examples; None for a single example.
  """
  each = np.mean([np.subtract(one, other, dtype=np.float64) for one, other in pairs], axis=0)
  error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else None
  return 100 * each.mean(), None if error is None else 100 * error


def correct(predict: Callable[[Array], Array], batches: Iterable[Any]) -> np.ndarray:
  """Which examples are classified rightly, bool `[n]`; arguments and errors of `top1`."""
  right, total = [], 0
  for batch in batches:
    logits = np.asarray(predict(batch.images))[batch.mask]
    if not np.isfinite(logits).all():
      raise ValueError(f"predict: logits are not finite after example {total}")
    right.append(logits.argmax(axis=-1) == batch.labels[batch.mask])
    total += len(logits)
  if not total:
    raise ValueError("batches: no example to evaluate")
  return np.concatenate(right)
