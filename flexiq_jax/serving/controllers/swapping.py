"""A peer: two whole models, INT8 and INT4, of which the device holds one.

As in `load` the level follows the estimated load and the queue. But a change keeps the device for
the time of loading a model, so it has to last:

1. The load is taken to go on for `hold` seconds, so a model that does not carry it is not kept.
2. What has queued up while a model was loaded is no reason to load the other one: for `hold`
   seconds after a change the queue does not count.
3. Down after `hold` seconds of less need; INFaaS (ATC 2021) waits for 10 to 20.
"""

import dataclasses
from typing import NamedTuple

from flexiq_jax.serving.controllers.base import Needs, Planned, Rate, Seen, check_positive, estimate
from flexiq_jax.serving.controllers.load import toward


class State(NamedTuple):
  """Of `Swapped`: as `load.State`, and when the level last changed."""

  rate: Rate
  level: int
  since: float
  changed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swapped(Planned):
  """See the module.

  Attributes:
    needs: what a load needs of each model (see `base.needs`).
    switch_s: seconds of a change, in which nothing is served.
    hold: seconds, see the module.
    tau, headroom: as of `load.Load`.
  """

  switch_s: float = dataclasses.field()  # to be given, unlike in `Planned`
  hold: float = 10.0
  tau: float = 0.5
  headroom: float = 1.0

  def __post_init__(self) -> None:
    """Raises ValueError where a setting is out of range."""
    check_positive(tau=self.tau, headroom=self.headroom, hold=self.hold)
    if self.switch_s < 0:
      raise ValueError(f"switch_s: {self.switch_s}; seconds of at least 0 are accepted")

  def start(self) -> State:
    """With the lowest level loaded."""
    return State(Rate(), 0, float("-inf"), float("-inf"))

  def step(self, state: State, seen: Seen) -> tuple[State, float]:
    """The model that the load wants, where a change would last."""
    rate = estimate(state.rate, seen, self.tau)
    queued = seen.queued if seen.now - state.changed >= self.hold else 0
    wanted = self.needs.level(self.headroom * rate.value, queued, self.hold)
    level, since = toward(wanted, state.level, state.since, seen.now, self.hold)
    changed = state.changed if level == state.level else seen.now
    return State(rate, level, since, changed), self.levels[level]


def swapping(needs: Needs, *, load_s: float = 0.5, **options: float) -> Swapped:
  """The controller of two models.

  Args:
    needs: of the two.
    load_s: seconds of loading a model.
    **options: of `Swapped`.

  Raises:
    ValueError: there are not two levels.
  """
  if len(needs.levels) != 2:
    raise ValueError(f"levels: {needs.levels}; two are accepted, of INT8 and of INT4")
  return Swapped(needs=needs, switch_s=load_s, **options)
