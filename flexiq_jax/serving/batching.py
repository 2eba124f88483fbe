"""Which of the waiting requests form the next batch, and which can no longer be in time.

Pure functions of the queue and a clock reading; engine and simulator call the same ones. Requests
leave in the order in which they came. A batch starts as soon as it is as large as it may be, or as
its oldest request has waited for `delay`, or as waiting on would make a deadline slip.

Given what waits, the batch is the prefix of the queue that runs most examples a second: with sizes
that are padded, 9 examples that run as 16 may be slower than 8 now and one later. Where deadlines
forbid that prefix, the largest that they allow is taken (AlpaServe grows its batches so).

| symbol     | shape   | meaning                                                       |
| ---------- | ------- | ------------------------------------------------------------- |
| arrivals   | [Q]     | when each waiting request came, clock seconds, ascending      |
| examples   | [Q]     | examples of each                                              |
| deadlines  | [Q]     | when its answer is due, inf without one; None: nobody has one |
| seconds    | [n + 1] | latency of a batch of 0..n examples at the present ratio      |
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
  """How batches are formed.

  Attributes:
    size: most examples in a batch.
    delay: longest time that the oldest request waits for company, seconds. 0 is greedy: whatever
      waits when the device is free runs.
  """

  size: int = 128
  delay: float = 0.0

  def __post_init__(self) -> None:
    """Checks both; raises ValueError."""
    if type(self.size) is not int or self.size < 1:
      raise ValueError(f"size: {self.size}; a positive integer is accepted")
    if not (math.isfinite(self.delay) and self.delay >= 0):
      raise ValueError(f"delay: {self.delay}; seconds of at least 0 are accepted")


class Plan(NamedTuple):
  """What to do with the queue.

  Attributes:
    take: how many requests run now; 0 to wait.
    until: when to look again, clock seconds, where nothing runs and nobody comes.
    need: examples in the queue from which on to look again at once.
  """

  take: int
  until: float
  need: int


def hopeless(
  now: float, examples: np.ndarray, deadlines: np.ndarray, fastest: np.ndarray
) -> np.ndarray:
  """Requests that would be late even if they ran now, alone and at the fastest ratio.

  Args:
    now: clock seconds.
    examples: int `[Q]`.
    deadlines: float64 `[Q]`.
    fastest: float64 `[n + 1]`, seconds of a batch at the fastest ratio in use.

  Returns:
    bool `[Q]`.
  """
  return now + fastest[examples] > deadlines


def plan(
  batching: Batching,
  now: float,
  arrivals: np.ndarray,
  examples: np.ndarray,
  deadlines: np.ndarray | None,
  seconds: np.ndarray,
) -> Plan:
  """Forms the next batch, or waits. The device is free.

  Args:
    batching: settings.
    now: clock seconds.
    arrivals: float64 `[Q]`, Q >= 1; more than `batching.size` requests need not be given.
    examples: int `[Q]`, each 1..`batching.size`.
    deadlines: float64 `[Q]` or None.
    seconds: float64 `[batching.size + 1]`.
  """
  if len(arrivals) == 1 and batching.delay == 0:  # under a light load nearly always
    return Plan(1, now, 0)
  totals = examples[: batching.size].cumsum()
  fit = int(totals.searchsorted(batching.size, "right"))
  totals = totals[:fit]
  waiting = int(totals[-1])
  full = waiting >= batching.size or fit < len(arrivals)
  until = -math.inf
  if not full and batching.delay > 0:
    until = float(arrivals[0]) + batching.delay
    if deadlines is not None:
      # A batch that starts later than this could not be full and in time.
      until = min(until, float(deadlines[:fit].min()) - float(seconds[batching.size]))
  if now < until:
    return Plan(0, until, batching.size)
  took = seconds[totals]
  if deadlines is not None:
    soonest = np.minimum.accumulate(deadlines[:fit])
    fine = now + took <= soonest
    if not fine.all():
      if not fine.any():
        return Plan(1, now, 0)
      totals, took = totals[fine], took[fine]
      # Prefixes that are in time need not be contiguous where the profile is not monotone.
      best = len(totals) - 1 - int((totals / took)[::-1].argmax())
      return Plan(int(np.flatnonzero(fine)[best]) + 1, now, 0)
  # Of prefixes that are as fast, the largest.
  return Plan(fit - int((totals / took)[::-1].argmax()), now, 0)
