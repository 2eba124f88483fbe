"""The engine: takes requests, forms batches, sets the ratio of each, answers every request once.

All of its state belongs to the event loop's thread; only `run` is called elsewhere, on one device
thread, one batch at a time. What runs next, and at which ratio, is `deciding.decide`, which the
simulator calls, too.

A request is answered exactly once: with its result, or with one of `Overloaded`, `TooLate`,
`Stopping` and `Failed`. A submitter that is cancelled, as when a client hangs up, leaves the queue.
"""

import asyncio
import collections
import concurrent.futures
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexiq_jax.serving import batching as batches
from flexiq_jax.serving.answers import (
  Answer,
  BatchRecord,
  Failed,
  Overloaded,
  ServingError,
  State,
  Stopping,
  TooLate,
)
from flexiq_jax.serving.batching import Batching
from flexiq_jax.serving.controllers import Controller, Fixed, Rate, Seen, estimate
from flexiq_jax.serving.deciding import Policy, Queue, decide
from flexiq_jax.serving.profile import Profile
from flexiq_jax.serving.request import Request, Statistics

_TICK = 1e-4  # seconds, to be past a moment and not at it
_TAU = 1.0  # seconds of the window of the arrivals that `state` shows


class Engine:
  """See the module.

  Attributes:
    ready: whether requests are taken.
    stopping: whether `stop` was called.
    on_batch: called with each `BatchRecord` on the event loop's thread; what it raises is logged.
  """

  def __init__(
    self,
    run: Callable[[np.ndarray, float], np.ndarray],
    controller: Controller,
    *,
    profile: Profile,
    batching: Batching,
    queue: int = 1024,
    warm: Sequence[int],
    example: np.ndarray,
    clock: Callable[[], float] = time.monotonic,
    on_batch: Callable[[BatchRecord], None] | None = None,
  ) -> None:
    """Checks that all parts fit; nothing runs yet.

    Args:
      run: `run(x [n, ...], ratio) -> y [n, ...]`, called on one thread (see `runner_function`).
      controller: of the ratio.
      profile: latencies that decisions rest on.
      batching: how batches are formed.
      queue: most examples that wait; more are refused.
      warm: batch sizes that are run before the engine is ready, those that `run` compiles.
      example: zeros of one example, `[...]`, whose shape and dtype requests must have.
      clock: seconds, on which deadlines are.
      on_batch: see above.

    Raises:
      ValueError: a size or level that the profile does not cover, or a queue that is too short.
    """
    if not warm or any(type(n) is not int or n < 1 for n in warm):
      raise ValueError(f"warm: {warm}; positive batch sizes are accepted")
    if batching.size > max(warm):
      raise ValueError(f"batching.size: {batching.size}; 1..{max(warm)} is accepted, as in warm")
    if queue < batching.size:
      raise ValueError(f"queue: {queue}; at least batching.size, {batching.size}, is accepted")
    self._run, self._example, self._clock = run, np.asarray(example), clock
    self._warm, self._bound = tuple(sorted(set(warm))), queue
    self._controller, self._profile, self._batching = controller, profile, batching
    self._policy = self._policy_of(controller)
    self._held: float | None = None
    self._state: Any = controller.start()
    self._statistics = Statistics(controller.levels[0])
    self._rate = Rate()
    # A linked list: whoever hangs up leaves from the middle at no cost.
    self._queue: collections.OrderedDict[int, Request] = collections.OrderedDict()
    self._running: tuple[Request, ...] = ()
    self._numbers, self._batch = itertools.count(), 0
    self._queued = self._arrived = self._deadlines = 0
    self._need = 1  # examples in the queue that end a wait
    # Nobody who waits becomes hopeless earlier, clock seconds; and what looks again then.
    self._soonest = math.inf
    self._timer: asyncio.TimerHandle | None = None
    self._wake = asyncio.Event()
    self._device: concurrent.futures.ThreadPoolExecutor | None = None
    self._task: asyncio.Task[None] | None = None
    self.ready = self.stopping = False
    self.on_batch = on_batch

  def _policy_of(self, controller: Controller) -> Policy:
    policy = Policy(profile=self._profile, batching=self._batching, controller=controller)
    _ = policy.fastest  # raises where the profile does not cover it
    return policy

  async def start(self) -> None:
    """Starts the device thread and warms all sizes; `ready` afterwards.

    Raises:
      Failed: `run` raised, or its result has another number of examples.
    """
    if self._device is not None:
      raise RuntimeError("start: the engine was started before; make another one")
    self._device = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
    loop, levels = asyncio.get_running_loop(), self._controller.levels
    for size in self._warm:
      for ratio in dict.fromkeys((levels[-1], levels[0])):
        if self.stopping:
          return
        zeros = [np.broadcast_to(self._example, (size, *self._example.shape))]
        outcome = await loop.run_in_executor(self._device, self._compute, zeros, ratio)
        if isinstance(outcome, BaseException):
          self._device.shutdown(wait=False)
          raise Failed(outcome) from outcome
    if not self.stopping:
      self.ready = True
      self._task = asyncio.create_task(self._serve(), name="engine")

  async def submit(self, x: np.ndarray, *, deadline: float | None = None) -> Answer:
    """Waits for the result of n >= 1 examples, which stay in one batch.

    Args:
      x: `[n, ...]`, n up to the batches' largest size.
      deadline: when the answer is due, clock seconds.

    Raises:
      ValueError: another shape or dtype, or too many examples.
      ServingError: there is no result; see the classes.
    """
    x = np.asarray(x)
    largest, shape = self._batching.size, self._example.shape
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape or not 1 <= len(x) <= largest:
      wanted = ", ".join(["n", *map(str, shape)])
      raise ValueError(f"x: shape {x.shape}; [{wanted}] with n in 1..{largest} is accepted")
    if x.dtype != self._example.dtype:
      raise ValueError(f"x: dtype {x.dtype}; {self._example.dtype} is accepted")
    if deadline is not None and math.isnan(deadline):
      raise ValueError("deadline: nan; clock seconds are accepted")
    if not self.ready or self.stopping:
      raise Stopping("the engine is " + ("stopping" if self.stopping else "not ready yet"))
    now, n = self._clock(), len(x)
    self._arrived += n
    self._rate = estimate(self._rate, Seen(now, self._arrived, 0, now), _TAU)
    self._expire(now)
    if self._queued + n > self._bound:
      self._statistics.refused += 1
      raise Overloaded(f"{self._queued} examples wait, of at most {self._bound}")
    due = math.inf if deadline is None else float(deadline)
    if now + self._policy.fastest[n] > due:
      self._statistics.late += 1
      raise TooLate(f"the deadline is {due - now:.4f} s away; a batch takes longer")
    future = asyncio.get_running_loop().create_future()
    number = next(self._numbers)
    request = Request(x=x, submitted=now, deadline=due, future=future)
    self._queue[number] = request
    self._queued += n
    self._deadlines += due < math.inf
    if (latest := due - float(self._policy.fastest[n])) < self._soonest:
      self._watch(latest)
    if self._queued >= self._need or due < math.inf:
      self._wake.set()
    try:
      return await future
    except asyncio.CancelledError:
      if self._queue.pop(number, None) is not None:
        self._forget(request)
      if future.cancelled():
        self._statistics.cancelled += 1
      else:  # answered or refused in the very same moment, and counted so
        future.exception()
      raise

  async def stop(self, drain_s: float = 30.0) -> None:
    """Refuses new requests, answers all that wait, then ends.

    Args:
      drain_s: seconds for that; who waits longer gets `Stopping`.
    """
    self.stopping, self.ready = True, False
    self._wake.set()
    if self._task is not None:
      await asyncio.wait({self._task}, timeout=drain_s)
      if not self._task.done():
        self._task.cancel()
        await asyncio.wait({self._task})
    # There is nobody left, unless time ran out.
    error = lambda: Stopping(f"the engine stopped before this request ran, after {drain_s} s")
    self._fail((*self._running, *self._take(len(self._queue))), error)
    self._watch(math.inf)
    if self._device is not None:
      self._device.shutdown(wait=False)

  def hold(self, ratio: float | None) -> None:
    """Holds a ratio by hand, from the next batch on; None gives it back to the controller.

    Raises:
      ValueError: the profile does not cover it.
    """
    if ratio is None:
      self._policy = self._policy_of(self._controller)
      self._state = self._controller.start()
    else:
      self._policy, self._state = self._policy_of(Fixed(ratio=float(ratio))), None
    self._held = ratio
    if self._deadlines:  # what is hopeless depends on the levels
      self._watch(-math.inf)
    self._wake.set()

  def state(self) -> State:
    """The engine at this moment."""
    now = self._clock()
    levels = self._controller.levels
    shown = estimate(self._rate, Seen(now, self._arrived, 0, now), _TAU)
    return State(
      ready=self.ready,
      stopping=self.stopping,
      queued=self._queued,
      level=int(np.abs(np.asarray(levels) - self._statistics.ratio).argmin()),
      levels=levels,
      held=self._held,
      arrivals=shown.value,
      **self._statistics.describe(now),
    )

  async def _serve(self) -> None:
    """Runs batch after batch until the engine stops and nobody waits."""
    while self._queue or not self.stopping:
      now = self._clock()
      self._expire(now)
      if not self._queue:
        self._need = 1
        await self._wait(None)
        continue
      try:
        chosen = decide(self._policy, self._state, self._seen(now), self._front())
      except Exception as error:  # of a controller; the engine lives on
        logging.exception("the decision on a batch failed")
        self._fail(self._take(len(self._queue)), functools.partial(Failed, error))
        self._state = self._policy.controller.start()
        continue
      self._state = chosen.state
      take, until, need = chosen.plan
      if take == 0 and not self.stopping:
        self._need = need
        await self._wait(until - now)
        continue
      # Who stops does not wait for company.
      self._running = self._take(take or self._fitting())
      await self._batch_of(self._running, chosen.ratio, now)
      self._running = ()

  async def _batch_of(self, requests: tuple[Request, ...], ratio: float, now: float) -> None:
    """Computes one batch and answers its requests."""
    assert self._device is not None
    loop, xs = asyncio.get_running_loop(), [request.x for request in requests]
    future = loop.run_in_executor(self._device, self._compute, xs, ratio)
    outcome, ended = await future, self._clock()
    record = BatchRecord(
      number=self._batch,
      size=sum(len(x) for x in xs),
      ratio=ratio,
      started=now,
      queued_s=np.array([now - request.submitted for request in requests]),
      computed_s=ended - now,
      outcome="failed" if isinstance(outcome, BaseException) else "answered",
    )
    self._batch += 1
    if isinstance(outcome, BaseException):
      self._fail(requests, functools.partial(Failed, outcome))
    else:
      self._answer(requests, outcome, record)
    self._statistics.count(record, requests, ended)
    if self.on_batch is not None:
      try:
        self.on_batch(record)
      except Exception:
        logging.exception("on_batch raised")

  def _answer(self, requests: Sequence[Request], y: np.ndarray, record: BatchRecord) -> None:
    """Gives each request its rows."""
    begin = 0
    for request, queued in zip(requests, record.queued_s.tolist(), strict=True):
      end = begin + len(request.x)
      answer = Answer(
        y=y[begin:end],
        ratio=record.ratio,
        queued_s=queued,
        computed_s=record.computed_s,
        batch=record.number,
      )
      request.answer(answer)
      begin = end

  def _compute(self, xs: list[np.ndarray], ratio: float) -> np.ndarray | BaseException:
    """On the device thread: the batch's result, or what it raised."""
    try:
      x = xs[0] if len(xs) == 1 else np.concatenate(xs)
      y = self._run(np.ascontiguousarray(x), ratio)
      if len(y) != len(x):
        raise ValueError(f"run: {len(y)} results for {len(x)} examples")
      return y
    except BaseException as error:  # SystemExit, too, must not end the thread
      return error

  def _seen(self, now: float) -> Seen:
    return Seen(now, self._arrived, self._queued, next(iter(self._queue.values())).submitted)

  def _front(self) -> Queue:
    front = list(itertools.islice(self._queue.values(), self._batching.size + 1))
    deadlines = np.array([r.deadline for r in front]) if self._deadlines else None
    arrivals = np.array([r.submitted for r in front])
    examples = None
    if self._queued > len(self._queue):
      examples = np.array([len(r.x) for r in front])
    return Queue(arrivals, examples, deadlines)

  def _fitting(self) -> int:
    examples = self._front().examples
    if examples is None:
      return min(len(self._queue), self._batching.size)
    totals = examples.cumsum()
    return int(totals.searchsorted(self._batching.size, "right"))

  def _take(self, count: int) -> tuple[Request, ...]:
    taken = tuple(self._queue.popitem(last=False)[1] for _ in range(count))
    for request in taken:
      self._forget(request)
    return taken

  def _forget(self, request: Request) -> None:
    """Takes a request that has left the queue out of the counts."""
    self._queued -= len(request.x)
    self._deadlines -= request.deadline < math.inf

  def _expire(self, now: float) -> None:
    """Answers those that can no longer be in time."""
    if now <= self._soonest:
      return
    numbers, waiting = list(self._queue), list(self._queue.values())
    examples = np.array([len(r.x) for r in waiting], int)
    deadlines = np.array([r.deadline for r in waiting])
    fastest = self._policy.fastest
    late = batches.hopeless(now, examples, deadlines, fastest)
    for i in np.flatnonzero(late):
      del self._queue[numbers[i]]
      self._forget(waiting[i])
      waited = now - waiting[i].submitted
      waiting[i].fail(TooLate(f"after {waited:.4f} s the deadline can no longer be met"))
      self._statistics.late += 1
    self._watch(float((deadlines - fastest[examples])[~late].min(initial=math.inf)))

  def _watch(self, soonest: float) -> None:
    """Looks at the queue again when somebody becomes hopeless, whatever the device does then."""
    self._soonest = soonest
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None
    if soonest < math.inf:
      wait = max(0.0, soonest + _TICK - self._clock())
      self._timer = asyncio.get_running_loop().call_later(wait, lambda: self._expire(self._clock()))

  def _fail(self, requests: Sequence[Request], error: Callable[[], ServingError]) -> None:
    for request in requests:  # an exception for each: its traceback grows where it is raised
      self._statistics.failed += request.fail(error())

  async def _wait(self, seconds: float | None) -> None:
    """Until somebody wakes the loop, or some seconds have passed."""
    self._wake.clear()
    if self.stopping or (self._queue and self._queued >= self._need):
      return
    try:
      async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
        await self._wake.wait()
    except TimeoutError:
      pass
