"""Solvers of bit width programs; all take `(problem, *, time_limit, seed)`, give a `Solution`.

| solver | result | for |
|---|---|---|
| enumerate_all | exact | up to 5e6 combinations, about 14 layers of 3 bit widths |
| milp | exact, given time | linear objectives of any size; quadratic ones: see below |
| local_search | good, with a bound if G is positive semi-definite | any size |

How long a quadratic program takes milp is a matter of its interactions. On random ones of 3 bit
widths a layer, 52 layers took it 4 s where interactions were weak (a fifth or less of products of
random vectors). At full strength 20 layers took 11 s, and with effects of rank 10 more than 25 s;
then local_search had the better plan, after 8 s.

`solve` chooses. All raise a ValueError if the limits leave no choice, naming limit, value and the
smallest one that would.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from flexiq_jax.methods.program import chains, highs, relaxation
from flexiq_jax.methods.program.blocks import Blocks
from flexiq_jax.methods.program.problem import Problem, Solution

_MOST = 5_000_000  # combinations that are enumerated
_QUICK = 200_000  # and those for which nothing else is tried
_LINEARISED = 200  # options of a quadratic program above which milp's relaxation takes minutes


def enumerate_all(problem: Problem, *, time_limit: float = 60.0, seed: int = 0) -> Solution:
  """Tries all combinations; the first of equal ones wins.

  Args:
    problem: at most 5e6 combinations of blocks' options.
    time_limit: ignored; the most takes seconds.
    seed: ignored; nothing is random.

  Raises:
    ValueError: too many combinations, or limits that cannot be met.
  """
  del time_limit, seed
  begin, blocks = time.monotonic(), Blocks.create(problem)
  if math.prod(blocks.sizes) > _MOST:
    raise ValueError(
      f"problem: {math.prod(blocks.sizes)} combinations; enumerate_all takes at most {_MOST}, use "
      "milp or local_search"
    )
  highs.cheapest(blocks)
  half = int(np.searchsorted(np.cumsum(np.log(blocks.sizes)), np.log(blocks.sizes).sum() / 2))
  ranges = [a + np.arange(s) for a, s in zip(blocks.starts, blocks.sizes, strict=True)]
  front, back = _product(ranges[:half]), _product(ranges[half:])
  sides = [blocks.one_hot(taken) for taken in (front, back)]
  pairs = np.zeros((len(blocks.linear),) * 2) if blocks.pairs is None else blocks.pairs
  value = np.add.outer(*(z @ blocks.linear + ((z @ pairs) * z).sum(axis=1) for z in sides))
  value += 2 * (sides[0] @ pairs) @ sides[1].T
  for cost, cap in zip(blocks.costs, blocks.caps, strict=True):
    value[np.add.outer(*(z @ cost for z in sides)) > cap] = np.inf
  # The caps were compared with sums in another order; the first that meets them as
  # `Solution` counts.
  while True:
    a, b = np.unravel_index(np.argmin(value), value.shape)
    taken = np.concatenate([front[a], back[b]])
    if blocks.meets(taken):
      break
    value[a, b] = np.inf
  return blocks.solution(
    problem,
    taken,
    bound=float(blocks.value(taken)),
    seconds=time.monotonic() - begin,
    solver="enumerate_all",
  )


def milp(problem: Problem, *, time_limit: float = 60.0, seed: int = 0) -> Solution:
  """HiGHS on the linearised program (highs.py); positive semi-definite or not.

  Args:
    problem: the program.
    time_limit: seconds; the plan's `bound` says what was proven until then.
    seed: ignored; HiGHS is deterministic.

  Raises:
    TimeoutError: no plan was found in time.
    ValueError: limits that cannot be met.
  """
  del seed
  begin, blocks = time.monotonic(), Blocks.create(problem)
  highs.cheapest(blocks)
  taken, bound = highs.minimise(blocks, time_limit)
  if taken is None:
    raise TimeoutError(f"time_limit: HiGHS found no plan in {time_limit} s; try local_search")
  seconds = time.monotonic() - begin
  return blocks.solution(problem, taken, bound=bound, seconds=seconds, solver="milp")


def local_search(problem: Problem, *, time_limit: float = 60.0, seed: int = 0) -> Solution:
  """Simulated annealing (chains.py).

  Args:
    problem: the program.
    time_limit: seconds, of which at most half go into the bound.
    seed: decides the plan, if there is time to finish.

  Returns:
    A plan; its bound is the continuous relaxation's (relaxation.py), None unless the objective is
    linear or positive semi-definite.

  Raises:
    ValueError: limits that cannot be met.
  """
  begin, blocks = time.monotonic(), Blocks.create(problem)
  taken = chains.search(blocks, highs.cheapest(blocks), seed, time_limit / 2)
  left = time_limit - (time.monotonic() - begin)
  bound = relaxation.lower_bound(blocks, taken, left) if blocks.convex() else -math.inf
  seconds = time.monotonic() - begin
  return blocks.solution(problem, taken, bound=bound, seconds=seconds, solver="local_search")


SOLVERS: dict[str, Callable[..., Solution]] = {
  f.__name__: f for f in (enumerate_all, milp, local_search)
}


def solve(
  problem: Problem, solver: str = "auto", *, time_limit: float = 60.0, seed: int = 0
) -> Solution:
  """Solves a bit width program.

  Args:
    problem: the program.
    solver: a name in `SOLVERS`, or "auto": enumeration of few combinations; milp for a linear
      objective; else local_search and, where it leaves a gap and the program is small enough, milp,
      of which the better plan and the better bound are returned.
    time_limit: seconds.
    seed: for solvers that draw.

  Raises:
    ValueError: an unknown solver, or limits that cannot be met.
  """
  if solver != "auto":
    if solver not in SOLVERS:
      raise ValueError(f"solver: {solver!r}; expected 'auto' or one of {tuple(SOLVERS)}")
    return SOLVERS[solver](problem, time_limit=time_limit, seed=seed)
  begin, blocks = time.monotonic(), Blocks.create(problem)
  if math.prod(blocks.sizes) <= _QUICK:
    return enumerate_all(problem)
  if blocks.pairs is None:
    return milp(problem, time_limit=time_limit)
  plan = local_search(problem, time_limit=time_limit / 2, seed=seed)
  if plan.optimal or len(blocks.linear) > _LINEARISED:
    return plan
  taken, bound = highs.minimise(blocks, time_limit - (time.monotonic() - begin))
  bounds = [b for b in (plan.bound, bound) if b is not None]
  candidates = [blocks.taken(problem, plan.bits), *([] if taken is None else [taken])]
  return blocks.solution(
    problem,
    min(candidates, key=blocks.value),
    bound=max(bounds),
    seconds=time.monotonic() - begin,
    solver="local_search+milp",
  )


def _product(ranges: list[np.ndarray]) -> np.ndarray:
  """All combinations, int `[N, len(ranges)]`, the last range fastest."""
  if not ranges:
    return np.zeros((1, 0), int)
  return np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, len(ranges))
