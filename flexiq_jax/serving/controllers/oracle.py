"""Knows the arrivals: how low the ratio can stay when nothing has to be estimated.

At each batch it takes the first level that keeps everybody in time who comes within the horizon:
with work that flows at T(ρ), the j-th of those who wait or will come waits

    w_j = max_{i <= j} (j - i + 1) / T(ρ) - (t_j - t_i),   t = now for those who wait,

and w_j may be no more than the target less one batch (half of the target, see `base.needs`). It is
greedy in time, so no proven optimum; it is what controllers that estimate are measured by.
"""

import dataclasses

import numpy as np

from flexiq_jax.serving.controllers.base import Planned, Seen, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Oracle(Planned):
  """See the module; `needs` and `switch_s` as of `base.Planned`.

  Attributes:
    arrivals: float64 `[N]`, all of them, one example each, on the clock that `Seen.now` reads.
    horizon: seconds that it looks ahead.
  """

  arrivals: np.ndarray
  horizon: float = 2.0

  def __post_init__(self) -> None:
    """Raises ValueError where the horizon is not positive."""
    check_positive(horizon=self.horizon)

  def start(self) -> None:
    """There is nothing to remember."""

  def step(self, state: None, seen: Seen) -> tuple[None, float]:
    """The first level at which nobody within the horizon waits too long."""
    first = int(self.arrivals.searchsorted(seen.now, "right"))
    last = int(self.arrivals.searchsorted(seen.now + self.horizon, "right"))
    times = self.arrivals[first:last] - seen.now
    # The last of those who wait stands for them all.
    times = np.concatenate([[0.0], times])
    place = np.arange(len(times)) + seen.queued
    for ratio, rate in zip(self.levels, self.needs.sustained, strict=True):
      ends = place / rate - times
      # Work before i is done by t_i where the queue ran empty.
      begins = np.minimum.accumulate(np.concatenate([[0.0], ends[:-1]]))
      if (ends - begins).max() <= self.needs.target / 2:
        return None, ratio
    return None, self.levels[-1]
