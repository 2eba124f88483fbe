"""The engine on a virtual clock: the same decisions, and a device that takes what a profile says.

Requests have one example each. The work is that of batches, not of requests: arrivals are an array,
the queue is a range of it, and each batch costs one call of `deciding.decide`. Nothing is random
here, so a run is a function of its arguments.
"""

import dataclasses
import math

import numpy as np

from flexiq_jax.serving import records
from flexiq_jax.serving.batching import Batching
from flexiq_jax.serving.controllers import Controller, Seen
from flexiq_jax.serving.deciding import Policy, Queue, decide
from flexiq_jax.serving.profile import Profile


@dataclasses.dataclass(kw_only=True, eq=False)
class _Waiting:
  """The queue: admitted requests from `head` on, up to `tail`; arrivals from `offered` on are due.

  Attributes:
    arrivals: float64 `[N]`, of all requests.
    bound: most requests that wait.
    patience: seconds from arrival after which a request is hopeless; inf without deadlines.
    which: int64 `[N]`, numbers of the admitted requests.
    times: float64 `[N]`, their arrivals.
    hopeless: (from, to) ranges of admitted requests that nothing was computed for.
  """

  arrivals: np.ndarray
  bound: int
  patience: float
  which: np.ndarray
  times: np.ndarray
  hopeless: list[tuple[int, int]] = dataclasses.field(default_factory=list)
  head: int = 0
  tail: int = 0
  offered: int = 0

  def admit(self, now: float) -> None:
    """Takes what came until now, as long as there is room; the rest is refused."""
    end = int(self.arrivals.searchsorted(now, "right"))
    count = end - self.offered
    if count <= self.bound - (self.tail - self.head):
      self._append(self.offered, end)
    elif self.patience == math.inf:
      self._append(self.offered, self.offered + self.bound - (self.tail - self.head))
    else:  # those who leave the queue meanwhile make room
      for number in range(self.offered, end):
        self.expire(float(self.arrivals[number]))
        if self.tail - self.head < self.bound:
          self._append(number, number + 1)
    self.offered = end

  def expire(self, now: float) -> None:
    """Removes those that can no longer be in time; as all are as patient, they are the oldest."""
    if self.patience == math.inf or self.head == self.tail:
      return
    waiting = self.times[self.head : self.tail]
    # As `batching.hopeless` for one example each.
    gone = int((now > waiting + self.patience).sum())
    if gone:
      self.hopeless.append((self.head, self.head + gone))
      self.head += gone

  def _append(self, begin: int, end: int) -> None:
    tail = self.tail + end - begin
    self.which[self.tail : tail] = np.arange(begin, end)
    self.times[self.tail : tail] = self.arrivals[begin:end]
    self.tail = tail


def simulate(
  arrivals: np.ndarray,
  controller: Controller,
  *,
  profile: Profile,
  batching: Batching,
  queue: int = 1024,
  deadline: float | None = None,
) -> records.Record:
  """Serves arrivals on a virtual clock.

  Args:
    arrivals: float64 `[N]`, ascending, seconds.
    controller: of the ratio.
    profile: how long batches take (p50).
    batching: how batches are formed.
    queue: most requests that wait.
    deadline: seconds from its arrival after which an answer is of no use to a request.

  Raises:
    ValueError: arrivals that are not ascending and finite, or parts that do not fit.
  """
  arrivals = np.ascontiguousarray(arrivals, np.float64)
  if arrivals.ndim != 1 or not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any():
    raise ValueError(f"arrivals: shape {arrivals.shape}; ascending finite seconds are accepted")
  if queue < batching.size:
    raise ValueError(f"queue: {queue}; at least batching.size, {batching.size}, is accepted")
  if deadline is not None and not deadline > 0:
    raise ValueError(f"deadline: {deadline}; positive seconds are accepted")
  policy = Policy(profile=profile, batching=batching, controller=controller)
  total, due = len(arrivals), math.inf if deadline is None else deadline
  waiting = _Waiting(
    arrivals=arrivals,
    bound=queue,
    patience=due - float(policy.fastest[1]),
    which=np.empty(total, np.int64),
    times=np.empty(total),
  )
  ones = np.ones(batching.size + 1, np.int64)
  state, now, ratio = controller.start(), 0.0, controller.levels[0]
  ran: list[
    tuple[int, int, float, float, float]
  ] = []  # first, one past the last, start, end, ratio
  switches = 0
  while True:
    waiting.admit(now)
    waiting.expire(now)
    head = waiting.head
    if head == waiting.tail:
      if waiting.offered == total:
        break
      now = float(arrivals[waiting.offered])
      continue
    times = waiting.times[head : min(waiting.tail, head + len(ones))]
    deadlines = times + due if due < math.inf else None
    seen = Seen(now, waiting.offered, waiting.tail - head, float(times[0]))
    state, chosen, plan = decide(policy, state, seen, Queue(times, ones[: len(times)], deadlines))
    if plan.take == 0:
      missing = waiting.offered + plan.need - (waiting.tail - head) - 1
      comes = float(arrivals[missing]) if missing < total else math.inf
      now = min(plan.until, comes)
      continue
    end = now + float(policy.seconds[chosen][plan.take])
    if chosen != ratio:
      switches += 1
      end += controller.switch_s
      ratio = chosen
    ran.append((head, head + plan.take, now, end, chosen))
    waiting.head += plan.take
    now = end
  return _record(waiting, ran, switches, due)


def _record(
  waiting: _Waiting, ran: list[tuple[int, int, float, float, float]], switches: int, due: float
) -> records.Record:
  """Spreads what batches were over their requests."""
  count = len(waiting.arrivals)
  record = records.Record(
    arrival=waiting.arrivals,
    start=np.full(count, np.nan),
    finish=waiting.arrivals.copy(),  # of those that are refused as they come
    ratio=np.full(count, np.nan),
    outcome=np.full(count, records.REFUSED, np.uint8),
    batch=np.full(count, -1, np.int64),
    switches=switches,
  )
  for begin, end in waiting.hopeless:
    who = waiting.which[begin:end]
    record.outcome[who] = records.LATE
    record.finish[who] = waiting.arrivals[who] + max(0.0, waiting.patience)
  if ran:
    table = np.array(ran)
    sizes = (table[:, 1] - table[:, 0]).astype(int)
    rows = np.repeat(np.arange(len(ran)), sizes)
    offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    who = waiting.which[table[rows, 0].astype(int) + offsets]
    record.start[who], record.finish[who] = table[rows, 2], table[rows, 3]
    record.ratio[who], record.batch[who] = table[rows, 4], rows
    record.outcome[who] = records.ANSWERED
  return record
