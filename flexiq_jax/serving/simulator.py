"""The engine on a virtual clock: the same decisions, and a device that takes what a profile says.

Requests have one example each. The work is that of batches, not of requests: arrivals are an array,
the queue is a range of it, and each batch costs one call of `deciding.decide`. Nothing is random
here, so a run is a function of its arguments.
"""

import bisect
import math

import numpy as np

from flexiq_jax.serving import records
from flexiq_jax.serving.batching import Batching
from flexiq_jax.serving.controllers import Controller, Seen
from flexiq_jax.serving.deciding import Policy, Queue, decide
from flexiq_jax.serving.profile import Profile


class _Waiting:
  """The queue: admitted requests from `head` on, up to `tail`; arrivals from `offered` on are due.

  As long as nobody was refused, admitted requests are arrivals, and nothing is copied.

  Attributes:
    arrivals: float64 `[N]`, of all requests.
    bound: most requests that wait.
    patience: seconds from arrival after which a request is hopeless; inf without deadlines.
    times: float64 `[N]`, arrivals of the admitted requests.
    which: int64 `[N]`, their numbers; None as long as they are 0, 1, 2, ...
    due: when the next request comes; inf where none does.
    hopeless: (from, to) ranges of admitted requests that nothing was computed for.
  """

  def __init__(self, arrivals: np.ndarray, bound: int, patience: float) -> None:
    """Nobody has come yet; arguments as the attributes."""
    self.arrivals, self.bound, self.patience = arrivals, bound, patience
    self.total = len(arrivals)
    self.times = arrivals
    self.which: np.ndarray | None = None
    self.hopeless: list[tuple[int, int]] = []
    self.head = self.tail = self.offered = 0
    self.due = float(arrivals[0]) if self.total else math.inf
    self._at = arrivals.data  # numbers of it are Python's, at no cost of memory

  def admit(self, now: float) -> None:
    """Takes what came until now, as long as there is room; the rest is refused.

    Args:
      now: at least `due`.
    """
    end = self._came(now)
    count = end - self.offered
    if count <= self.bound - (self.tail - self.head):
      self._append(self.offered, end)
    elif self.patience == math.inf:
      self._append(self.offered, self.offered + self.bound - (self.tail - self.head))
    else:  # those who leave the queue meanwhile make room
      for number in range(self.offered, end):
        self.expire(self._at[number])
        if self.tail - self.head < self.bound:
          self._append(number, number + 1)
    self.offered = end
    self.due = self._at[end] if end < self.total else math.inf

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

  def numbers(self) -> np.ndarray:
    """int64 `[tail]`, numbers of the admitted requests."""
    return np.arange(self.tail) if self.which is None else self.which[: self.tail]

  def _came(self, now: float) -> int:
    """How many have come until now, at least one more than before; it looks nearby first."""
    at, low, step = self._at, self.offered, 1
    while low + step < self.total and at[low + step] <= now:
      low, step = low + step, 2 * step
    if step == 1:
      return low + 1
    return bisect.bisect_right(at, now, low + 1, min(low + step, self.total))

  def _append(self, begin: int, end: int) -> None:
    tail = self.tail + end - begin
    if self.which is None and begin > self.tail:  # the first ones after somebody was refused
      self.which, self.times = np.arange(self.total), self.arrivals.copy()
    if self.which is not None:
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
  waiting = _Waiting(arrivals, queue, due - float(policy.fastest[1]))
  state, now, ratio = controller.start(), 0.0, controller.levels[0]
  took = {level: seconds.tolist() for level, seconds in policy.seconds.items()}
  most, switches = batching.size + 1, 0
  ran: list[float] = []  # five numbers a batch: first, one past the last, start, end, ratio
  while True:
    if waiting.due <= now:
      waiting.admit(now)
    if deadline is not None:
      waiting.expire(now)
    head, count = waiting.head, waiting.tail - waiting.head
    if not count:
      if waiting.due == math.inf:
        break
      now = waiting.due
      continue
    front = count if count < most else most
    times = waiting.times[head : head + front]
    deadlines = None if deadline is None else times + due
    seen = Seen(now, waiting.offered, count, times.item(0))
    state, chosen, plan = decide(policy, state, seen, Queue(times, None, deadlines))
    take, until, need = plan
    if take == 0:
      missing = waiting.offered + need - count - 1
      comes = float(arrivals[missing]) if missing < total else math.inf
      now = min(until, comes)
      continue
    end = now + took[chosen][take]
    if chosen != ratio:
      switches += 1
      end += controller.switch_s
      ratio = chosen
    ran += (head, head + take, now, end, chosen)
    waiting.head += take
    now = end
  return _record(waiting, ran, switches)


def _record(waiting: _Waiting, ran: list[float], switches: int) -> records.Record:
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
  numbers = waiting.numbers()
  for begin, end in waiting.hopeless:
    who = numbers[begin:end]
    record.outcome[who] = records.LATE
    record.finish[who] = waiting.arrivals[who] + max(0.0, waiting.patience)
  if ran:
    table = np.array(ran).reshape(-1, 5)
    sizes = (table[:, 1] - table[:, 0]).astype(int)
    rows = np.repeat(np.arange(len(table)), sizes)
    offsets = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    who = numbers[table[rows, 0].astype(int) + offsets]
    record.start[who], record.finish[who] = table[rows, 2], table[rows, 3]
    record.ratio[who], record.batch[who] = table[rows, 4], rows
    record.outcome[who] = records.ANSWERED
  return record
