"""Which images a model is calibrated on: drawn once from training data, never from the test set."""

import numpy as np

from flexiq_jax.data.source import Source, is_integer


def calibration_indices(source: Source, count: int, seed: int) -> np.ndarray:
  """Draws examples without repetition, balanced over the classes.

  Classes take turns: every class gives its first example, then every class that has one its
  second, and so on, each round in a random order of the classes. So counts of classes that are not
  exhausted differ by at most one, and the first n of a longer draw are the draw of n. Where reading
  the labels would mean reading the whole dataset (`labels_are_cheap` is False: ImageNet) the draw
  is uniform.

  Args:
    source: the training data.
    count: how many examples.
    seed: any non-negative integer; the draw depends on nothing else but the labels.

  Returns:
    int64 [count], in the order of the draw.

  Raises:
    ValueError: count or seed is out of range.
  """
  if not is_integer(count) or not 1 <= count <= len(source):
    raise ValueError(
      f"count of calibration examples is {count}; 1..{len(source)} is accepted for {source}"
    )
  if not is_integer(seed) or seed < 0:
    raise ValueError(f"seed is {seed}; a non-negative integer is accepted")
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(source))
  if not source.labels_are_cheap:
    return order[:count]
  labels = source.labels[order]
  # How many of the same class come earlier in the permutation.
  by_class = np.argsort(labels, kind="stable")
  grouped = labels[by_class]
  starts = np.searchsorted(grouped, grouped)
  turn = np.empty(len(order), np.int64)
  turn[by_class] = np.arange(len(order)) - starts
  # Within a turn the permutation's own order is kept: a random order of the classes.
  return order[np.argsort(turn, kind="stable")][:count]


def require_separate(calibration: Source, evaluation: Source) -> None:
  """Refuses calibration on the data that the model is evaluated on.

  Args:
    calibration: the source that ranges, scores and fitness are computed on.
    evaluation: the source that accuracy is reported on.

  Raises:
    ValueError: both are the same split of the same files.
  """
  if calibration.identity == evaluation.identity:
    raise ValueError(
      f"calibration and evaluation both read {calibration} ({', '.join(calibration.identity)}): "
      "accuracy would be reported on data the method has seen; "
      "give calibration another split or root"
    )
