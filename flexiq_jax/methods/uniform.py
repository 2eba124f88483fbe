"""Every layer at the same bits."""

from collections.abc import Sequence

from flexiq_jax.methods.base import Method, Plan
from flexiq_jax.methods.task import Task


class Uniform(Method):
  """Every layer at the budget, rounded, whichever widths the task has."""

  name = "uniform"
  reference = True

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Average bits alone are a width."""
    return task.unit == "average bits" and not task.layers_only

  @classmethod
  def widths(cls, budgets: Sequence[float]) -> tuple[int, ...]:
    """A width for each budget."""
    return tuple(round(budget) for budget in budgets)

  def at(self, budget: float) -> list[Plan]:
    """One plan; nothing is measured."""
    (bits,) = self.widths([budget])
    return [Plan(bits=dict.fromkeys(self.start.choices.names, bits))]
