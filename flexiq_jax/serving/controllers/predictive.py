"""The rule of `load` for the load that a short-term trend foretells.

Two exponential windows of lengths τ_f < τ_s see the mean age of what they average, so a rate that
grows by s a second reads λ - s τ_f and λ - s τ_s. Hence s, and the rate after `ahead` seconds:

    s = (λ_f - λ_s) / (τ_s - τ_f),   λ(t + ahead) = λ_f + s (τ_f + ahead)

A falling trend is not followed: to come down late costs accuracy, to come down early costs time.
"""

import dataclasses
from typing import NamedTuple

from flexiq_jax.serving.controllers.base import Planned, Rate, Seen, check_positive, estimate
from flexiq_jax.serving.controllers.load import toward


class State(NamedTuple):
  """Of `Predictive`: both estimates, the level's number, and when it was last wanted."""

  fast: Rate
  slow: Rate
  level: int
  since: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictive(Planned):
  """See the module; `needs` and `switch_s` as of `base.Planned`.

  Attributes:
    fast, slow: τ_f and τ_s, seconds.
    ahead: seconds that the forecast looks ahead.
    horizon, headroom, hold: as of `load.Load`.
  """

  fast: float = 0.5
  slow: float = 2.0
  ahead: float = 0.5
  horizon: float = 1.0
  headroom: float = 1.0
  hold: float = 0.5

  def __post_init__(self) -> None:
    """Raises ValueError where a setting is not positive, or the windows are not in order."""
    check_positive(fast=self.fast, horizon=self.horizon, headroom=self.headroom, hold=self.hold)
    if not self.slow > self.fast or self.ahead < 0:
      raise ValueError(
        f"fast, slow, ahead: {self.fast}, {self.slow}, {self.ahead}; fast < slow and ahead >= 0 "
        "are accepted"
      )

  def start(self) -> State:
    """At the lowest level, without estimates."""
    return State(Rate(), Rate(), 0, float("-inf"))

  def step(self, state: State, seen: Seen) -> tuple[State, float]:
    """The level that the forecast and the queue want."""
    fast = estimate(state.fast, seen, self.fast)
    slow = estimate(state.slow, seen, self.slow)
    slope = (fast.value - slow.value) / (self.slow - self.fast)
    rate = fast.value + max(0.0, slope) * (self.fast + self.ahead)
    wanted = self.needs.level(self.headroom * rate, seen.queued, self.horizon)
    level, since = toward(wanted, state.level, state.since, seen.now, self.hold)
    return State(fast, slow, level, since), self.levels[level]
