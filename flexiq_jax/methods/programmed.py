"""Methods that end in an integer program: they measure an objective, and the solver does the rest.

The average is the limit; where what is found is more than 0.05 below, a limit 0.05 above it is
tried, too, so that few large layers cost no method more than they must.
"""

import abc
import dataclasses
import functools

import numpy as np

from flexiq_jax.methods.base import Method, Plan
from flexiq_jax.methods.program import Choices, Problem, solve
from flexiq_jax.methods.task import TOLERANCE


def check_positive(name: str, value: int) -> None:
  """Refuses what is no whole number above 0."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{name}: {value!r} is not a positive integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSettings:
  """What methods of this kind have in common.

  Attributes:
    block: examples in one forward pass of a measurement.
    time_limit: seconds for one program.
  """

  block: int = 64
  time_limit: float = 60.0

  def __post_init__(self):
    check_positive("block", self.block)
    if not self.time_limit > 0:
      raise ValueError(f"time_limit: {self.time_limit!r}; seconds above 0")


class Programmed(Method):
  """A method whose plan is the least of an objective."""

  Settings = ProgramSettings

  @abc.abstractmethod
  def measured(self) -> np.ndarray:
    """The objective: `[n, n]` or `[n]` (see `program.Problem`); called once."""

  @functools.cached_property
  def objective(self) -> np.ndarray:
    """What is minimised."""
    return self.measured()

  @functools.cached_property
  def choices(self) -> Choices:
    """The options."""
    return self.start.choices

  def at(self, budget: float) -> list[Plan]:
    """The plan of least objective; column `gap` where the solver has one."""
    task, solutions = self.start.task, []
    least, *_ = candidates = self._limits(task.limit(budget))
    for limit in candidates:
      problem = Problem(choices=self.choices, objective=self.objective, limits={task.cost: limit})
      found = solve(problem, time_limit=self.settings.time_limit, seed=self.start.seed)
      solutions.append(found)
      if least - found.costs[task.cost] <= TOLERANCE:
        break
    # The nearest; the first of equal ones, which is not above the budget.
    best = min(solutions, key=lambda one: abs(one.costs[task.cost] - least))
    columns = {} if best.gap is None else {"gap": best.gap}
    seconds = sum(one.seconds for one in solutions)
    return [Plan(bits=best.bits, seconds=seconds, columns=columns)]

  def _limits(self, limit: float) -> tuple[float, ...]:
    return (limit, limit + TOLERANCE) if self.start.task.unit == "average bits" else (limit,)
