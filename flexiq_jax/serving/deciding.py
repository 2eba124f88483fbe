"""One decision: the ratio and the batch, from the queue and a clock reading.

Engine and simulator both call `decide` when the device is free and requests wait, and nothing else
decides. It is pure: same arguments, same decision.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from flexiq_jax.serving import batching as batches
from flexiq_jax.serving.batching import Batching
from flexiq_jax.serving.controllers import Controller, Seen
from flexiq_jax.serving.profile import Profile


class Queue(NamedTuple):
  """The requests at the front of the queue, at least `Batching.size` + 1 of them if so many wait.

  Attributes:
    arrivals: float64 `[Q]`, clock seconds, ascending.
    examples: int `[Q]`; or None where each has one.
    deadlines: float64 `[Q]`, inf without one; or None where nobody has one.
  """

  arrivals: np.ndarray
  examples: np.ndarray | None
  deadlines: np.ndarray | None


class Decision(NamedTuple):
  """What `decide` found.

  Attributes:
    state: of the controller, for the next decision.
    ratio: of the batch.
    plan: which requests run, or how long to wait.
  """

  state: Any
  ratio: float
  plan: batches.Plan


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
  """What decisions rest on.

  Attributes:
    profile: latencies.
    batching: settings; its size within the profile's largest.
    controller: of the ratio; its levels within the profile's.
  """

  profile: Profile
  batching: Batching
  controller: Controller

  @functools.cached_property
  def seconds(self) -> dict[float, np.ndarray]:
    """Ratio -> seconds of a batch of 0..size examples; in ascending order."""
    size = self.batching.size
    return {r: self.profile.latencies(r, size) for r in self.controller.levels}

  @functools.cached_property
  def best(self) -> dict[float, list[int]]:
    """Ratio -> `batching.prefixes` of these."""
    return {ratio: batches.prefixes(seconds) for ratio, seconds in self.seconds.items()}

  @functools.cached_property
  def fastest(self) -> np.ndarray:
    """Seconds of a batch of 0..size examples at the best level for each."""
    return np.min([*self.seconds.values()], axis=0)


def decide(policy: Policy, state: Any, seen: Seen, queue: Queue) -> Decision:
  """Takes the controller's ratio and forms a batch.

  Where the first request would be late at that ratio, the next level at which it is not is taken
  for this batch; `hopeless` has removed requests that are late at every level.

  Args:
    policy: profile, batching and controller.
    state: of the controller.
    seen: the present.
    queue: who waits; not empty.
  """
  state, ratio = policy.controller.step(state, seen)
  arrivals, examples, deadlines = queue
  if deadlines is not None:
    due, n = deadlines[0], 1 if examples is None else examples[0]
    if seen.now + policy.seconds[ratio][n] > due:
      higher = (r for r, s in policy.seconds.items() if r > ratio and seen.now + s[n] <= due)
      ratio = next(higher, ratio)
  tables = policy.seconds[ratio], policy.best[ratio]
  plan = batches.plan(policy.batching, seen.now, arrivals, examples, deadlines, *tables)
  return Decision(state, ratio, plan)
