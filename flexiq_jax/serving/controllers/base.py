"""What a controller sees and says; the one signature of all of them.

A controller is a frozen object with a pure function `step(state, seen) -> (state, ratio)`, called
whenever the device is free and requests wait. It keeps no memory of its own, so the same object
serves the engine and the simulator, and a step can be repeated.

| symbol | meaning                                                                        |
| ------ | ------------------------------------------------------------------------------ |
| λ̂      | arrivals a second, estimated: examples weighted by exp(-age / τ) / τ           |
| T(ρ)   | examples a second that the profile sustains at ratio ρ within the target       |
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Seen(NamedTuple):
  """What is known when the device is free.

  Attributes:
    now: clock seconds.
    arrived: examples that were offered since the start, refused ones included.
    queued: examples that wait.
    oldest: when the oldest waiting request came, clock seconds.
  """

  now: float
  arrived: int
  queued: int
  oldest: float


@runtime_checkable
class Controller(Protocol):
  """Chooses the ratio of the next batch.

  Attributes:
    levels: the ratios that it may choose, ascending.
    switch_s: seconds that a change of the ratio keeps the device from computing.
  """

  @property
  def levels(self) -> tuple[float, ...]:
    """See above."""
    ...

  @property
  def switch_s(self) -> float:
    """See above."""
    ...

  def start(self) -> Any:
    """The state before the first step."""
    ...

  def step(self, state: Any, seen: Seen) -> tuple[Any, float]:
    """The next state, and the ratio from now on."""
    ...


class Rate(NamedTuple):
  """An estimate of the arrivals a second, and what it was made of.

  Attributes:
    value: λ̂, examples a second.
    time: of the last reading; -inf before the first.
    arrived: examples at that time.
    first: time of the first reading.
  """

  value: float = 0.0
  time: float = -math.inf
  arrived: int = 0
  first: float = -math.inf


def estimate(rate: Rate, seen: Seen, tau: float) -> Rate:
  """Moves an estimate on to a later reading.

  An exponential window of irregular steps. As long as less than τ has passed since the first
  reading, the window is that long, though not below τ / 4, in which a few requests say little.

  Args:
    rate: the estimate so far.
    seen: a reading; `now` and `arrived` do not descend.
    tau: τ, seconds.
  """
  value, time, before, first = rate
  now, arrived = seen.now, seen.arrived
  if time == -math.inf:
    return Rate(0.0, now, arrived, now)
  passed = now - time
  if passed <= 0:
    return rate
  window = now - first
  if not window < tau:
    window = tau
  elif window < tau / 4:
    window = tau / 4
  weight = -math.expm1(-passed / window)
  return Rate(value + weight * ((arrived - before) / passed - value), now, arrived, first)


def check_levels(levels: tuple[float, ...]) -> None:
  """Raises ValueError unless levels are ascending numbers in 0..1."""
  fine = all(isinstance(r, int | float) and 0 <= r <= 1 for r in levels)
  if not levels or not fine or list(levels) != sorted(set(levels)):
    raise ValueError(f"levels: {levels}; ascending numbers in 0..1 are accepted")


def check_positive(**values: float) -> None:
  """Raises ValueError unless all values are positive and finite."""
  for name, value in values.items():
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f"{name}: {value}; a positive number is accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
  """What a load needs of the levels of a profile.

  Attributes:
    levels: ratios, ascending.
    sustained: T(ρ) of each level, in batches whose latency leaves room for waiting.
    target: seconds within which a request is to be answered.
  """

  levels: tuple[float, ...]
  sustained: tuple[float, ...]
  target: float

  def level(self, rate: float, queued: int, horizon: float) -> int:
    """The first level at which nobody waits too long; the last where there is none.

    After `horizon` seconds of a load of `rate`, `queued + (rate - T(ρ)) horizon` examples wait, or
    none; now it is `queued`. Both are to be worked off within half of the target. So a level need
    not carry the load at once where the queue has room for the difference.

    Args:
      rate: arrivals that are expected, examples a second.
      queued: examples that wait already.
      horizon: seconds.
    """
    target = self.target
    for i, sustained in enumerate(self.sustained):
      backlog = queued + (rate - sustained) * horizon if rate > sustained else queued
      if backlog <= sustained * target / 2:
        return i
    return len(self.levels) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """A controller that plans with what a load needs.

  Attributes:
    needs: see `needs`.
    switch_s: seconds that a change keeps the device; 0 for FlexiQ, whose change is a number.
  """

  needs: Needs
  switch_s: float = 0.0

  @property
  def levels(self) -> tuple[float, ...]:
    """Those of the needs."""
    return self.needs.levels


def needs(profile: Any, levels: tuple[float, ...], target: float, largest: int) -> Needs:
  """Reads a profile for `Needs`.

  A request that just missed a batch waits for it and then runs in one of its own, so a batch may
  take half of the target (Proteus, ASPLOS 2024, plans so).

  Args:
    profile: a `Profile`.
    levels: ratios, ascending.
    target: seconds.
    largest: examples in a batch at most.
  """
  check_levels(levels)
  check_positive(target=target)
  return Needs(
    levels=levels,
    sustained=tuple(profile.throughput(r, largest, within=target / 2) for r in levels),
    target=target,
  )
