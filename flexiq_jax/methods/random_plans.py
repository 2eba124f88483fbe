"""Random layers at more bits while the budget lasts: what knowing nothing of the model is worth."""

import dataclasses

import numpy as np

from flexiq_jax.methods.base import Method, Plan
from flexiq_jax.methods.programmed import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSettings:
  """How random plans are compared.

  Attributes:
    random_plans: how many are drawn; their mean counts.
  """

  random_plans: int = 2

  def __post_init__(self):
    check_positive("random_plans", self.random_plans)


class Random(Method):
  """Random layers are raised by one width at a time."""

  name = "random"
  Settings = RandomSettings
  reference = True

  def at(self, budget: float) -> list[Plan]:
    """As many plans as the settings say; nothing is measured."""
    return [self.draw(budget, number) for number in range(self.settings.random_plans)]

  def draw(self, budget: float, number: int) -> Plan:
    """The plan of a number, which is the same at every call."""
    start = self.start
    task, choices = start.task, start.choices
    rng = np.random.default_rng((start.seed, number))
    names, bits, widths = choices.names, choices.uniform(min), task.bits
    cost = choices.costs[task.cost].reshape(len(names), -1)
    price = dict(zip(names, cost, strict=True))
    left = task.limit(budget) - sum(price[name][0] for name in names) + 1e-9
    while True:
      at = {name: widths.index(bits[name]) for name in names}
      rise = {n: price[n][i + 1] - price[n][i] for n, i in at.items() if i + 1 < len(widths)}
      if not (fits := [n for n, extra in rise.items() if extra <= left]):
        return Plan(bits=bits)
      name = fits[rng.integers(len(fits))]
      bits[name] = widths[widths.index(bits[name]) + 1]
      left -= rise[name]
