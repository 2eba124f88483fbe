"""A plain engine on a virtual clock, one event at a time: the simulator's oracle, and its peer."""

import math

import numpy as np

from flexiq_jax.serving import Batching, Controller, Profile, batching, records
from flexiq_jax.serving.controllers import Seen


def event_by_event(
  arrivals: np.ndarray,
  controller: Controller,
  profile: Profile,
  settings: Batching,
  bound: int,
  deadline: float | None,
) -> tuple[np.ndarray, ...]:
  """What `simulate` computes, with a list as its queue.

  Args:
    arrivals: float64 `[N]`, seconds.
    controller: of the ratio.
    profile: latencies.
    settings: of batching.
    bound: most requests that wait.
    deadline: seconds from arrival, or None.

  Returns:
    Ratio, start, finish, outcome and batch of each request, all `[N]`.
  """
  n = len(arrivals)
  ratio, start, finish = np.full(n, np.nan), np.full(n, np.nan), np.array(arrivals, float)
  outcome, batch = np.full(n, records.REFUSED), np.full(n, -1)
  tables = {r: profile.latencies(r, settings.size) for r in controller.levels}
  patience = math.inf
  if deadline is not None:
    patience = deadline - min(t[1] for t in tables.values())
  queue, came, now, last, state, number = [], 0, 0.0, controller.levels[0], controller.start(), 0

  def leave(t):
    for i in [i for i in queue if t > arrivals[i] + patience]:
      queue.remove(i)
      outcome[i], finish[i] = records.LATE, arrivals[i] + max(0.0, patience)

  while True:
    while came < n and arrivals[came] <= now:  # one at a time, each finds the queue of its moment
      if len(queue) >= bound:
        leave(arrivals[came])
      if len(queue) < bound:
        queue.append(came)
      came += 1
    leave(now)
    if not queue:
      if came == n:
        return ratio, start, finish, outcome, batch
      now = arrivals[came]
      continue
    state, r = controller.step(state, Seen(now, came, len(queue), arrivals[queue[0]]))
    due = None if deadline is None else np.array([arrivals[i] + deadline for i in queue])
    if due is not None:
      for level in controller.levels:
        if level >= r and now + tables[r][1] > due[0] and now + tables[level][1] <= due[0]:
          r = level
    plan = batching.plan(
      *(settings, now, np.array([arrivals[i] for i in queue])),
      *(np.ones(len(queue), int), due, tables[r], ()),
    )
    if plan.take == 0:
      # Until the time is up, or the queue is long enough.
      moments = [arrivals[i] for i in range(came, n)][: plan.need - len(queue)]
      enough = moments[-1] if len(moments) == plan.need - len(queue) else math.inf
      now = min(plan.until, enough)
      continue
    end = now + tables[r][plan.take]
    if r != last:
      end += controller.switch_s
      last = r
    for i in queue[: plan.take]:
      ratio[i], start[i], finish[i] = r, now, end
      outcome[i], batch[i] = records.ANSWERED, number
    del queue[: plan.take]
    number, now = number + 1, end
