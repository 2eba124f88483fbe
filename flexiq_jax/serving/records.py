"""What became of the requests of a run, live or simulated: one record for both."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

ANSWERED, REFUSED, LATE, FAILED, PENDING = range(5)
OUTCOMES = ("answered", "refused", "late", "failed", "pending")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Record:
  """N requests of one example each.

  Attributes:
    arrival: float64 `[N]`, intended send times, seconds.
    start: float64 `[N]`, when its batch started; nan where it was in none.
    finish: float64 `[N]`, when it was answered, with a result or a refusal.
    ratio: float64 `[N]`, 4-bit ratio of its batch; nan where it was in none.
    outcome: uint8 `[N]`, numbers of `OUTCOMES`.
    batch: int64 `[N]`, number of its batch, ascending in time; -1 where it was in none.
    switches: changes of the ratio from one batch to the next.
  """

  arrival: np.ndarray
  start: np.ndarray
  finish: np.ndarray
  ratio: np.ndarray
  outcome: np.ndarray
  batch: np.ndarray
  switches: int

  @property
  def latency(self) -> np.ndarray:
    """float64 `[N]`, seconds from the intended send time to the result; inf without a result."""
    return np.where(self.outcome == ANSWERED, self.finish - self.arrival, np.inf)


def summary(
  record: Record, *, target: float, accuracy: Mapping[float, float] | None = None
) -> dict[str, float | int | None]:
  """A row of a table.

  Args:
    record: of a run.
    target: seconds within which a request should be answered.
    accuracy: top-1 by ratio, percent; linear between. None: unknown.

  Returns:
    `requests`; `median`, `p90`, `p99` in seconds over all requests, one without a result counting
    as endless; `in_time`, share of all requests answered within the target; `goodput`, such
    requests a second; `mean_ratio` and `accuracy` over those answered (None without any);
    `switches`; and the number of each of `OUTCOMES`.
  """
  count, latency = len(record.arrival), record.latency
  answered = record.outcome == ANSWERED
  p50, p90, p99 = percentiles(latency, (50, 90, 99))
  in_time = int((latency <= target).sum())
  span = float(record.arrival[-1] - record.arrival[0]) if count else 0.0
  ratios = record.ratio[answered]
  top1 = float(interpolated(accuracy, ratios).mean()) if accuracy and ratios.size else None
  return {
    "requests": count,
    **{"median": p50, "p90": p90, "p99": p99},
    "in_time": in_time / count if count else None,
    "goodput": in_time / span if span else None,
    "mean_ratio": float(ratios.mean()) if ratios.size else None,
    "accuracy": top1,
    "switches": record.switches,
    **{name: int((record.outcome == i).sum()) for i, name in enumerate(OUTCOMES)},
  }


def interpolated(accuracy: Mapping[float, float], ratios: Any) -> np.ndarray:
  """Accuracies at some ratios, float64 of their shape: linear between the known ones; nan stays.

  Args:
    accuracy: by ratio, not empty.
    ratios: float64, any shape.
  """
  known = sorted(accuracy)
  return np.interp(ratios, known, [accuracy[r] for r in known])


def percentiles(latency: np.ndarray, at: tuple[float, ...]) -> tuple[float | None, ...]:
  """Nearest-rank percentiles, for which inf is a value like others; None of nothing."""
  if not latency.size:
    return (None,) * len(at)
  ordered = np.sort(latency)
  ranks = np.ceil(np.asarray(at) / 100 * len(ordered)).astype(int).clip(1) - 1
  return tuple(float(v) for v in ordered[ranks])


def over_time(record: Record, bins: np.ndarray, values: np.ndarray, how: str) -> np.ndarray:
  """Values of requests by the time of their arrival.

  Args:
    record: of a run.
    bins: float64 `[B + 1]`, edges in seconds.
    values: float64 `[N]`; nan does not count.
    how: `median` or `mean`.

  Returns:
    float64 `[B]`, nan where there is none.
  """
  reduce = {"median": np.median, "mean": np.mean}[how]
  edges = record.arrival.searchsorted(bins)
  found = np.full(len(bins) - 1, np.nan)
  for i, (a, b) in enumerate(itertools.pairwise(edges)):
    part = values[a:b][~np.isnan(values[a:b])]
    if part.size:
      found[i] = reduce(part)
  return found
