"""A request in an engine, and the counts that an engine keeps of them."""

import asyncio
import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexiq_jax.serving.answers import Answer, BatchRecord, ServingError

_WINDOW = 10.0  # seconds of answers that percentiles are over
_MOST = 10_000  # answers in the window at most


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
  """One submission.

  Attributes:
    x: `[n, ...]`.
    submitted: clock seconds.
    deadline: clock seconds, inf without one.
    future: of the submitter, who may have cancelled it.
  """

  x: np.ndarray
  submitted: float
  deadline: float
  future: asyncio.Future[Answer]

  def answer(self, answer: Answer) -> None:
    """Gives the result, unless nobody waits for it any more."""
    if not self.future.done():
      self.future.set_result(answer)

  def fail(self, error: ServingError) -> bool:
    """Gives a reason instead; whether somebody was there to hear it."""
    if self.future.done():
      return False
    self.future.set_exception(error)
    return True


class Statistics:
  """Counts of an engine; it belongs to the event loop's thread."""

  def __init__(self, ratio: float) -> None:
    """Args: ratio: what is shown before the first batch."""
    self.ratio = ratio
    self.answered = self.refused = self.late = self.failed = self.cancelled = 0
    self.batches: collections.Counter[int] = collections.Counter()
    self._examples, self._weighted = 0, 0.0
    self._ended: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST)

  def count(self, record: BatchRecord, requests: Sequence[Request], ended: float) -> None:
    """Counts a batch that has ended, after its requests were answered."""
    self.ratio = record.ratio
    self.batches[record.size] += 1
    if record.outcome != "answered":
      return
    for request in requests:
      if not request.future.cancelled():
        self.answered += 1
        self._ended.append((ended, ended - request.submitted))
        self._examples += len(request.x)
        self._weighted += len(request.x) * record.ratio

  def describe(self, now: float) -> dict[str, Any]:
    """The fields of `answers.State` that are counted here."""
    recent = [latency for ended, latency in self._ended if now - ended <= _WINDOW]
    p50, p90, p99 = np.percentile(recent, (50, 90, 99)) if recent else (math.nan,) * 3
    return {
      "ratio": self.ratio,
      **{"p50": float(p50), "p90": float(p90), "p99": float(p99)},
      **{"answered": self.answered, "refused": self.refused, "late": self.late},
      **{"failed": self.failed, "cancelled": self.cancelled},
      "batches": dict(sorted(self.batches.items())),
      "effective_ratio": self._weighted / self._examples if self._examples else math.nan,
    }
