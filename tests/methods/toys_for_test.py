"""Two methods that are one file each could be: one that plans, and one that trains."""

import dataclasses

import jax
import jax.numpy as jnp

from flexiq_jax.methods import Details, Method, Plan, Runnable, Shown, Task
from flexiq_jax.methods.task import sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheapestSettings:
  """Which end to begin with."""

  largest_first: bool = False


class CheapestFirst(Method):
  """Raises layers to the highest bits in order of their MACs while the budget lasts."""

  name = "cheapest_first"
  Settings = CheapestSettings

  def at(self, budget: float) -> list[Plan]:
    """One plan; looks at MACs alone."""
    start = self.start
    order = sorted(start.layers, key=lambda layer: layer.macs, reverse=self.settings.largest_first)
    bits = start.choices.uniform(min)
    for layer in order:
      raised = {**bits, layer.name: max(start.task.bits)}
      cost = start.choices.costs[start.task.cost] @ start.choices.pick(raised)
      if cost <= start.task.limit(budget) + 1e-9:
        bits = raised
    return [Plan(bits=bits, columns={"raised": float(len(set(bits.values())) > 1)})]

  @classmethod
  def report(cls, shown: Shown) -> Details:
    """A sentence."""
    return Details(notes=(f"{len(shown.names)} layers were sorted by their MACs.",))


class TrainedBias(Method):
  """Trains one number for each class on top of the 8-bit model, which is all that it runs at."""

  name = "trained_bias"

  @classmethod
  def fits(cls, task: Task) -> bool:
    """It has no layers to choose for."""
    return not task.layers_only

  def at(self, budget: float) -> Runnable:
    """The same model for every budget; it trains at the first."""
    del budget
    start = self.start
    network, model = start.network, start.calibrated.base
    bias = start.once("bias", lambda: self.measure(1.0, self._train))
    return Runnable(
      predict=lambda x: network.uniform(model, x) + bias[None],
      avg_bits=8.0,
      sizes=sizes(network.layers, {}, None, 8),
    )

  def _train(self):
    """One step for each of a few batches."""
    network, model = self.start.network, self.start.calibrated.base
    bias = 0.0
    for _, (images, labels) in zip(range(2), self.start.training(16).epoch(1), strict=False):
      x = self.start.prepare(jax.random.key(0), images)
      logits = network.uniform(model, jnp.asarray(x))
      bias += jax.nn.one_hot(labels, logits.shape[1]).mean(axis=0)
    return bias
