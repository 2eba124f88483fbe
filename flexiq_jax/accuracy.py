"""Accuracy of a model at any ratio, and the largest ratio that keeps it.

| data | metric | what counts as right |
|---|---|---|
| with labels | `top-1` | the largest logit is the label's |
| without | `agreement` | the largest logit is the float model's |
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax import inputs
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.orders import LEVELS
from flexiq_jax.runs.interruption import quiet

Array = Any


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Accuracy at several ratios, in percent; `accuracy[0.5]` is that at one.

  Attributes:
    metric: `top-1`, or `agreement` with the float model.
    unquantized: the float model's.
    values: ratio -> accuracy.
    examples: how many predictions were counted.
  """

  metric: str
  unquantized: float
  values: Mapping[float, float]
  examples: int

  def __getitem__(self, ratio: float) -> float:
    return self.values[ratio]

  def drop(self, ratio: float) -> float:
    """Points below the float model."""
    return self.unquantized - self.values[ratio]

  def __str__(self) -> str:
    rows = [f"{self.metric} in %, {self.examples} examples", f" float  {self.unquantized:6.2f}"]
    rows += [f"{100 * ratio:4.0f} %  {value:6.2f}" for ratio, value in self.values.items()]
    return "\n".join(rows)


@quiet
def evaluate(model: AdaptiveModel, data: Any, ratios: Iterable[float] | float = LEVELS) -> Accuracy:
  """Accuracy of a model at some ratios, beside the float model's.

  Args:
    model: the model; its results are logits `[B, ..., K]`.
    data: `(x, labels)`, or an iterable of such pairs, with labels int `[B, ...]`; or, without
      labels, an array or an iterable of arrays: then agreement with the float model is measured.
    ratios: shares of the selectable MACs in 4 bits, each in 0..1.

  Raises:
    ValueError: there are no data, labels do not fit, or the results are no logits.
  """
  ratios = (ratios,) if isinstance(ratios, int | float) else tuple(ratios)
  return measure(model, inputs.pairs(data, "data"), ratios)


@quiet
def largest_ratio(model: AdaptiveModel, data: Any, max_drop: float, *, steps: int = 20) -> float:
  """The largest ratio at which a model loses no more than so many points.

  Args:
    model: the model.
    data: as for `evaluate`; without labels the drop is the share of predictions that change.
    max_drop: points of accuracy (percent) below the float model.
    steps: the ratios tried are k/steps, from 1 downwards.

  Raises:
    ValueError: as `evaluate`; or no ratio is good enough.
  """
  pairs = list(inputs.pairs(data, "data"))
  drop = 0.0
  for step in range(steps, -1, -1):
    drop = measure(model, pairs, (step / steps,)).drop(step / steps)
    if drop <= max_drop:
      return step / steps
  raise ValueError(f"max_drop: {max_drop}; at ratio 0 already {drop:.2f} points are lost")


def measure(
  model: AdaptiveModel, pairs: Iterable[tuple[Array, Array | None]], ratios: Sequence[float]
) -> Accuracy:
  """Accuracy on batches and their labels; arguments and errors as `evaluate`."""
  right, exact, total, labelled = dict.fromkeys(ratios, 0), 0, 0, False
  for x, labels in pairs:
    target = unquantized = _predicted(model.network.float(x))
    if labels is not None:
      labelled, target = True, np.asarray(labels)
      if target.shape != unquantized.shape:
        raise ValueError(
          f"data: labels of shape {list(target.shape)}; {list(unquantized.shape)} is accepted, the "
          "class of each prediction"
        )
    exact += int((unquantized == target).sum())
    total += target.size
    for ratio in ratios:
      right[ratio] += int((_predicted(model(x, ratio)) == target).sum())
  return Accuracy(
    metric="top-1" if labelled else "agreement",
    unquantized=100 * exact / total,
    values={ratio: 100 * count / total for ratio, count in right.items()},
    examples=total,
  )


def has_logits(model: AdaptiveModel, x: Array) -> bool:
  """Whether the float model's result for `x` is an array `[B, ..., K]`, K above 1."""
  y = model.network.float(x)
  return hasattr(y, "shape") and y.ndim > 1 and y.shape[-1] > 1


def _predicted(logits: Array) -> np.ndarray:
  """Numbers of the largest logits, int `[B, ...]`."""
  if not hasattr(logits, "shape") or logits.ndim < 2:
    what = f"shape {list(logits.shape)}" if hasattr(logits, "shape") else type(logits).__name__
    raise ValueError(
      f"model: its result is a {what}; logits [B, ..., K] are accepted: quantize a function that "
      "returns them alone, as lambda params, x: net(params, x)['logits']"
    )
  logits = np.asarray(logits, np.float32)
  if not np.isfinite(logits).all():
    raise ValueError("model: its logits are not finite")
  return logits.argmax(axis=-1)
