"""An open-loop client within the process: sends to an engine at given times, records what came."""

import asyncio
import time
from collections.abc import Callable

import numpy as np

from flexiq_jax.serving import records
from flexiq_jax.serving.answers import Failed, Overloaded, ServingError, Stopping, TooLate
from flexiq_jax.serving.engine import Engine
from flexiq_jax.serving.profile import Profile

_OUTCOME: dict[type[ServingError], int] = {
  Overloaded: records.REFUSED,
  Stopping: records.REFUSED,
  TooLate: records.LATE,
  Failed: records.FAILED,
}


def stand_in(
  profile: Profile,
  *,
  switch_s: float = 0.0,
  sleep: Callable[[float], None] = time.sleep,
  clock: Callable[[], float] = time.monotonic,
) -> Callable[[np.ndarray, float], np.ndarray]:
  """A device that sleeps as long as a profile says, and returns each example's first number.

  A system wakes sleepers late. By how much, the next sleep is shorter, so that the mean is right.

  Args:
    profile: of the latencies.
    switch_s: seconds more where the ratio changes.
    sleep: seconds -> None.
    clock: seconds.
  """
  tables: dict[float, np.ndarray] = {}
  last, behind = [-1.0], [0.0]

  def run(x: np.ndarray, ratio: float) -> np.ndarray:
    if ratio not in tables:
      tables[ratio] = profile.latencies(ratio)
    changed = last[0] not in (-1.0, ratio)
    seconds = float(tables[ratio][len(x)]) + switch_s * changed
    begun = clock()
    sleep(max(0.0, seconds - behind[0]))
    last[0], behind[0] = ratio, max(0.0, behind[0] + clock() - begun - seconds)
    return x.reshape(len(x), -1)[:, :1].copy()

  return run


async def replay(
  engine: Engine,
  arrivals: np.ndarray,
  x: np.ndarray,
  *,
  deadline: float | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> records.Record:
  """Sends one example at each time, whether or not earlier ones are answered.

  Args:
    engine: ready; its clock is `clock`.
    arrivals: float64 `[N]`, ascending, seconds from now on.
    x: `[1, ...]`, what each request holds.
    deadline: seconds from the intended time.
    clock: seconds.

  Returns:
    The record; times are from the start of the replay.
  """
  count = len(arrivals)
  finish, ratio = np.full(count, np.nan), np.full(count, np.nan)
  start, batch = np.full(count, np.nan), np.full(count, -1, np.int64)
  outcome = np.full(count, records.PENDING, np.uint8)
  begun = clock()

  async def one(i: int) -> None:
    due = None if deadline is None else begun + arrivals[i] + deadline
    try:
      answer = await engine.submit(x, deadline=due)
    except ServingError as error:
      outcome[i], finish[i] = _OUTCOME[type(error)], clock() - begun
      return
    finish[i] = clock() - begun
    start[i] = finish[i] - answer.computed_s
    ratio[i], batch[i], outcome[i] = answer.ratio, answer.batch, records.ANSWERED

  async with asyncio.TaskGroup() as group:
    i = 0
    while i < count:
      wait = begun + arrivals[i] - clock()
      if wait > 0:
        await asyncio.sleep(wait)
        continue
      end = int(arrivals.searchsorted(clock() - begun, "right"))
      for j in range(i, max(end, i + 1)):
        group.create_task(one(j))
      i = max(end, i + 1)
      await asyncio.sleep(0)
  order = batch[batch >= 0].argsort(kind="stable")
  ratios = ratio[batch >= 0][order]
  return records.Record(
    arrival=np.asarray(arrivals, np.float64),
    start=start,
    finish=finish,
    ratio=ratio,
    outcome=outcome,
    batch=batch,
    switches=int((np.diff(ratios) != 0).sum()),
  )
