"""The smallest ratio that keeps the queue short under the present load: quick up, slow down.

FlexiQ raises the ratio with the load; its rule is not known, this one is ours. Before each batch:

1. λ̂ is estimated over the last τ seconds.
2. The level wanted is the first at which, should `headroom` λ̂ go on for the horizon, nobody waits
   longer than half of the target (`base.Needs.level`); the other half is for the batch itself.
3. Up at once, as far as wanted. Down by one level after `hold` seconds in which less was wanted.

With a short horizon the queue takes up much of a peak, which costs time and saves accuracy; with a
long one the level that carries the whole load is wanted at once. By default it is 2 τ: further
ahead than that an estimate over τ says little.
"""

import dataclasses
from typing import NamedTuple

from flexiq_jax.serving.controllers.base import Planned, Rate, Seen, check_positive, estimate


class State(NamedTuple):
  """Of `Load`: the estimate, the level's number, and when it was last wanted."""

  rate: Rate
  level: int
  since: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load(Planned):
  """See the module; `needs` and `switch_s` as of `base.Planned`.

  Attributes:
    tau: τ, seconds.
    horizon: seconds that the load is taken to go on.
    headroom: how much more than λ̂ is expected.
    hold: seconds of less need before it goes down by one level.
  """

  tau: float = 0.5
  horizon: float = 1.0
  headroom: float = 1.0
  hold: float = 0.5

  def __post_init__(self) -> None:
    """Raises ValueError where a setting is not positive."""
    check_positive(tau=self.tau, horizon=self.horizon, headroom=self.headroom, hold=self.hold)

  def start(self) -> State:
    """At the lowest level, without an estimate."""
    return State(Rate(), 0, float("-inf"))

  def step(self, state: State, seen: Seen) -> tuple[State, float]:
    """The level that the estimate and the queue want."""
    rate = estimate(state.rate, seen, self.tau)
    wanted = self.needs.level(self.headroom * rate.value, seen.queued, self.horizon)
    level, since = toward(wanted, state.level, state.since, seen.now, self.hold)
    return State(rate, level, since), self.needs.levels[level]


def toward(wanted: int, level: int, since: float, now: float, hold: float) -> tuple[int, float]:
  """Quick up, slow down.

  Args:
    wanted: number of the level that would do.
    level: the present one's.
    since: when the present level was last wanted, or was come down to.
    now: clock seconds.
    hold: seconds before a step down.

  Returns:
    The next level, and its `since`.
  """
  if wanted >= level:
    return wanted, now
  if now - since >= hold:
    return level - 1, now
  return level, since
