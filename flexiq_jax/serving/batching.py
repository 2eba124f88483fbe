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
| examples   | [Q]     | examples of each; None: one each                              |
| deadlines  | [Q]     | when its answer is due, inf without one; None: nobody has one |
| seconds    | [n + 1] | latency of a batch of 0..n examples at the present ratio      |
"""

import dataclasses
import math
from collections.abc import Sequence
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
  examples: np.ndarray | None,
  deadlines: np.ndarray | None,
  seconds: np.ndarray,
  best: Sequence[int],
) -> Plan:
  """Forms the next batch, or waits. The device is free.

  Args:
    batching: settings.
    now: clock seconds.
    arrivals: float64 `[Q]`, Q >= 1; more than `batching.size` requests need not be given.
    examples: int `[Q]`, each 1..`batching.size`, or None.
    deadlines: float64 `[Q]` or None.
    seconds: float64 `[batching.size + 1]`.
    best: `prefixes(seconds)`.
  """
  if examples is None:
    if deadlines is None:
      return _plain(batching, now, arrivals, best)
    examples = np.ones(len(arrivals), np.int64)
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
      last = len(totals) - 1 - int((totals / took)[::-1].argmax())
      return Plan(int(np.flatnonzero(fine)[last]) + 1, now, 0)
  # Of prefixes that are as fast, the largest.
  return Plan(fit - int((totals / took)[::-1].argmax()), now, 0)


def prefixes(seconds: np.ndarray) -> list[int]:
  """How many of 0, 1, ... waiting examples run most of them a second; the largest such number.

  Args:
    seconds: float64 `[n + 1]`, of batches of 0..n examples.
  """
  best, found, fastest = 0, [0], 0.0
  for count, took in enumerate(seconds[1:].tolist(), start=1):
    if count / took >= fastest:
      best, fastest = count, count / took
    found.append(best)
  return found


def _plain(batching: Batching, now: float, arrivals: np.ndarray, best: Sequence[int]) -> Plan:
  """The usual case, without arrays: requests of one example, none with a deadline."""
  waiting = len(arrivals)
  if waiting >= batching.size:
    waiting = batching.size
  elif batching.delay > 0 and now < (until := arrivals.item(0) + batching.delay):
    return Plan(0, until, batching.size)
  return Plan(best[waiting], now, 0)
