"""Arrivals of an open loop: when each request is meant to be sent, whatever the server does.

Every function takes a seed and returns ascending seconds, float64 `[N]`. A client sends by these
times and measures latency from them, so that a client that is late does not hide a slow server.

Sources: Poisson arrivals as in FlexiQ's Fig. 8; counts by the second as in its Fig. 9, InfAdapter
and Loki (Poisson within the second); gamma and bursts (MMPP) as in AlpaServe.
"""

import csv
import math
import os
from pathlib import Path

import numpy as np


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
  """A Poisson process: cumulative exponential gaps.

  Args:
    rate: requests a second, at least 0.
    seconds: span.
    seed: of the gaps.
  """
  _check(rate=rate, seconds=seconds)
  return _until(lambda rng, n: rng.exponential(1.0, n), rate, seconds, seed)


def gamma(rate: float, seconds: float, cv: float, seed: int) -> np.ndarray:
  """Independent gamma gaps with a given coefficient of variation; 1 is Poisson, above is bursty.

  Args:
    rate: requests a second, at least 0.
    seconds: span.
    cv: standard deviation of a gap over its mean.
    seed: of the gaps.
  """
  _check(rate=rate, seconds=seconds)
  if not (math.isfinite(cv) and cv > 0):
    raise ValueError(f"cv: {cv}; a positive number is accepted")
  shape = cv**-2
  return _until(lambda rng, n: rng.gamma(shape, 1 / shape, n), rate, seconds, seed)


def bursts(
  low: float, high: float, seconds: float, seed: int, *, calm: float = 10.0, burst: float = 2.0
) -> np.ndarray:
  """A Markov-modulated Poisson process of two states, whose dwell times are exponential.

  Args:
    low: requests a second while calm.
    high: requests a second in a burst.
    seconds: span.
    seed: of dwell times and gaps.
    calm: mean seconds of a calm; it begins with one.
    burst: mean seconds of a burst.
  """
  _check(low=low, high=high, seconds=seconds)
  if not (calm > 0 and burst > 0):
    raise ValueError(f"calm, burst: {calm}, {burst}; positive seconds are accepted")
  rng = np.random.default_rng(seed)
  edges, busy = [0.0], False
  while edges[-1] < seconds:
    edges.append(edges[-1] + rng.exponential(burst if busy else calm))
    busy = not busy
  rates = np.where(np.arange(len(edges) - 1) % 2, high, low)
  return _piecewise(np.minimum(edges, seconds), rates, rng)


def trace(counts: np.ndarray, seed: int, *, seconds: float | None = None) -> np.ndarray:
  """Replays requests per second: a Poisson process whose rate is each second's count.

  Args:
    counts: float `[S]`, requests in each second, at least 0 (see `read_trace`, `rescale`).
    seed: of the gaps.
    seconds: span that the S seconds are stretched or squeezed to, at the same rates; S if None.
  """
  counts = np.asarray(counts, np.float64)
  if counts.ndim != 1 or not counts.size or not (np.isfinite(counts) & (counts >= 0)).all():
    raise ValueError(f"counts: shape {counts.shape}; numbers of at least 0, [S], are accepted")
  span = float(len(counts)) if seconds is None else seconds
  _check(seconds=span)
  edges = np.linspace(0.0, span, len(counts) + 1)
  return _piecewise(edges, counts, np.random.default_rng(seed))


def rescale(counts: np.ndarray, low: float, high: float, *, mean_over: int = 10) -> np.ndarray:
  """An affine map that takes a running mean's least and greatest value to `low` and `high`.

  Args:
    counts: float `[S]`.
    low: requests a second at the quietest time.
    high: requests a second at the peak.
    mean_over: seconds of the running mean, which takes the noise of single seconds away. The
      result is the map of that mean, since arrivals are drawn around it again.

  Returns:
    float64 `[S]`, requests a second.
  """
  counts = np.asarray(counts, np.float64)
  if not 1 <= mean_over <= len(counts):
    raise ValueError(f"mean_over: {mean_over}; 1..{len(counts)} is accepted")
  if not 0 <= low <= high:
    raise ValueError(f"low, high: {low}, {high}; 0 <= low <= high is accepted")
  sums = np.convolve(counts, np.ones(mean_over), "same")
  smooth = sums / np.convolve(np.ones(len(counts)), np.ones(mean_over), "same")
  least, most = smooth.min(), smooth.max()
  if most == least:
    return np.full(len(counts), float(high))
  return low + (smooth - least) * ((high - low) / (most - least))


def read_trace(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads columns `second,count` after lines that start with `#`.

  Returns:
    float64 `[S]`, the counts of seconds 0, 1, ...

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another header, or a line that is not the next second with its count.
  """
  path = Path(os.path.expandvars(path))
  if not path.is_file():
    raise FileNotFoundError(f"trace {str(path)!r}: no such file")
  with path.open(newline="") as file:
    rows = list(csv.reader(line for line in file if not line.startswith("#")))
  if not rows or rows[0] != ["second", "count"]:
    found = rows[0] if rows else []
    raise ValueError(f"trace {str(path)!r}: columns {found}; second,count is accepted")
  counts = []
  for second, row in enumerate(rows[1:]):
    fine = len(row) == 2 and row[0] == str(second) and row[1].isdecimal()
    if not fine:
      raise ValueError(f"trace {str(path)!r}: {row}; second {second} and its count are due here")
    counts.append(float(row[1]))
  if not counts:
    raise ValueError(f"trace {str(path)!r}: no seconds; one or more are accepted")
  return np.array(counts)


def _until(draw, rate: float, seconds: float, seed: int) -> np.ndarray:
  """Cumulative gaps of mean 1 / rate up to a time."""
  rng, parts, end = np.random.default_rng(seed), [np.zeros(0)], 0.0
  while rate > 0 and end < seconds:
    left = (seconds - end) * rate
    gaps = draw(rng, int(left + 4 * math.sqrt(left) + 16)) / rate
    times = end + np.cumsum(gaps)
    parts.append(times)
    end = float(times[-1])
  times = np.concatenate(parts)
  return times[times < seconds]


def _piecewise(edges: np.ndarray, rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A Poisson process of piecewise constant rate, by the inverse of its mean function."""
  mean = np.concatenate([[0.0], np.cumsum(np.diff(edges) * rates)])
  total = mean[-1]
  count = rng.poisson(total)
  # Given their number, arrivals are uniform in the mean; sums of exponential gaps are just that.
  gaps = rng.exponential(1.0, count + 1)
  places = np.cumsum(gaps)[:-1] / gaps.sum() * total
  return np.interp(places, mean, edges)


def _check(**values: float) -> None:
  for name, value in values.items():
    if not (math.isfinite(value) and value >= 0):
      raise ValueError(f"{name}: {value}; a number of at least 0 is accepted")
