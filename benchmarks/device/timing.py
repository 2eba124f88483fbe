"""Honest times of short functions on an accelerator.

A kernel of microseconds takes less time than the call that starts it. So a function is compiled as
a *chain*, several calls in one program, each on a copy of its own of the weights, and chains are
queued one after another until they run for about `SPAN`: seconds of a call when calls follow each
other. Beside it, `latency`: one call alone, from the start to the result being there.

Of functions that are compared, each runs once a round; figures are medians over rounds, and ratios
are of the same round.
"""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

Array = Any
SPAN = 0.01  # seconds of one measurement
COLD = 96 * 2**20  # bytes of weights that a chain goes through: no cache of a GPU holds them
COPIES = (2, 16)  # fewest and most calls in a chain


class Run(Protocol):
  """A function that can be timed.

  Attributes:
    calls: in one chain.
  """

  calls: int

  def warm(self) -> None:
    """Compiles and runs everything once."""

  def chain(self, repeats: int) -> None:
    """Runs so many chains and waits for the last."""

  def single(self) -> None:
    """Runs one call and waits for it."""


def copies_for(size: int, result: int = 0) -> int:
  """How many copies of weights of `size` bytes a chain takes; few where results are large."""
  least, most = COPIES
  if result > 2**28:
    most = 4
  return max(least, min(most, -(-COLD // max(1, size))))


def nbytes(tree: Any) -> int:
  """Bytes of all arrays of a pytree."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


class Chains:
  """Compiled chains, shared by runs of one function whose arguments have the same shapes."""

  def __init__(self, rotate: int = 1):
    """Starts without any; `rotate` is the argument that has a copy for each call."""
    self._rotate = rotate
    self._compiled: dict[int, Callable] = {}
    self._copies: dict[tuple[int, int], list[Any]] = {}

  def run(self, call: Any, copies: int) -> "JaxRun":
    """What times a `functools.partial` of a jitted function."""
    function, arguments = call.func, call.args
    chain = self._compiled.setdefault(id(function), jax.jit(_chained(function)))
    weights = arguments[self._rotate]
    key = (id(weights), copies)
    if key not in self._copies:
      copy = lambda a: jax.numpy.array(a, copy=True)
      self._copies[key] = [weights] + [jax.tree.map(copy, weights) for _ in range(copies - 1)]
    groups = [
      (*arguments[: self._rotate], w, *arguments[self._rotate + 1 :]) for w in self._copies[key]
    ]
    return JaxRun(function, chain, groups)


def _chained(function: Callable[..., Any]) -> Callable[[list[tuple]], list[Any]]:
  return lambda groups: [function(*group) for group in groups]


class JaxRun:
  """A jitted function, alone and in a chain."""

  def __init__(self, function: Callable, chain: Callable, groups: list[tuple]):
    """Keeps what is called; nothing is compiled yet."""
    self._function, self._chain, self._groups = function, chain, groups
    self.calls = len(groups)

  def warm(self) -> None:
    """See `Run`."""
    self.single()
    self.chain(1)

  def chain(self, repeats: int) -> None:
    """See `Run`."""
    y = None
    for _ in range(repeats):
      y = self._chain(self._groups)
    jax.block_until_ready(y)

  def single(self) -> None:
    """See `Run`."""
    jax.block_until_ready(self._function(*self._groups[0]))


class Alone(JaxRun):
  """A jitted function in a chain only: one compilation, and no latency of its own."""

  def __init__(self, function: Callable, groups: list[tuple]):
    """Keeps what is called; nothing is compiled yet."""
    super().__init__(function, jax.jit(_chained(function)), groups)

  def warm(self) -> None:
    """See `Run`."""
    self.chain(1)

  def single(self) -> None:
    """One chain: nothing else is compiled."""
    self.chain(1)

  def first(self) -> Any:
    """What the first call of a chain makes."""
    return self._chain(self._groups)[0]


def warm_all(runs: Mapping[Any, Run], threads: int = 8) -> tuple[dict[Any, Run], dict[Any, str]]:
  """Compiles all, side by side; those that the device refuses are told with its reason.

  Args:
    runs: name -> run.
    threads: that compile.

  Returns:
    The runs that work, and name -> reason of the others.
  """
  refused: dict[Any, str] = {}

  def warm(name: Any) -> None:
    try:
      runs[name].warm()
    except Exception as error:  # a library's refusals have no class in common
      refused[name] = reason(error)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(warm, runs))
  return {name: run for name, run in runs.items() if name not in refused}, refused


def reason(error: BaseException) -> str:
  """An exception in a line."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"[:300]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
  """Times of one function.

  Attributes:
    us: microseconds of a call when calls follow each other, median of rounds.
    latency_us: of one call alone, median.
    rounds: how many.
    ratio: time relative to the base's in the same round, median; None without a base.
  """

  us: float
  latency_us: float
  rounds: int
  ratio: float | None


def measure(
  runs: Mapping[str, Run],
  seconds: float,
  *,
  base: str | None = None,
  rounds: tuple[int, int] = (3, 15),
  span: float = SPAN,
) -> dict[str, Times]:
  """Times functions in turn until the time is over.

  Args:
    runs: name -> run that is warm.
    seconds: time box; the fewest rounds are made in any case.
    base: what ratios are to.
    rounds: fewest and most.
    span: seconds of one measurement.
  """
  end = time.monotonic() + seconds
  repeats = {}
  for name, run in runs.items():
    once = _seconds(lambda run=run: run.chain(1))
    repeats[name] = max(1, min(200, round(span / max(once, 1e-6))))
  chained: dict[str, list[float]] = {name: [] for name in runs}
  alone: dict[str, list[float]] = {name: [] for name in runs}
  for i in range(rounds[1]):
    if i >= rounds[0] and time.monotonic() > end:
      break
    for name, run in runs.items():
      taken = _seconds(lambda run=run, n=repeats[name]: run.chain(n))
      chained[name].append(taken / (repeats[name] * run.calls))
      alone[name].append(statistics.median(_seconds(run.single) for _ in range(3)))
  return {
    name: Times(
      us=1e6 * statistics.median(chained[name]),
      latency_us=1e6 * statistics.median(alone[name]),
      rounds=len(chained[name]),
      ratio=None if base not in runs else ratio(chained[name], chained[base]),
    )
    for name in runs
  }


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
  """Median of the ratios of rounds."""
  return statistics.median(t / b for t, b in zip(times, base, strict=True))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
  """`p50`, `p90` and `p99` in microseconds, and how many calls they are of."""
  p50, p90, p99 = np.percentile(np.asarray(seconds), (50, 90, 99))
  return {"p50_us": 1e6 * p50, "p90_us": 1e6 * p90, "p99_us": 1e6 * p99, "calls": len(seconds)}


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start
