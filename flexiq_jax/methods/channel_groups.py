"""FlexiQ (EuroSys 2026): channel groups in 4 or 8 bits, in an order that serves every ratio."""

import functools
import time

from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.methods.base import Method, Runnable
from flexiq_jax.methods.task import Task, sizes


class FlexiQ(Method):
  """The groups in the order that the config's search finds."""

  name = "flexiq"
  greedy = False

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Groups are parts of layers, and each is in 4 or in 8 bits."""
    return task.unit == "average bits" and not task.layers_only

  @functools.cached_property
  def model(self) -> AdaptiveModel:
    """The model at any ratio; searched once and then read back."""
    begin = time.monotonic()
    model, forwards = self.start.order(self.greedy)
    if forwards is not None:
      # The pass that scores every group alone comes before any search.
      self.note(time.monotonic() - begin, 1.0 + forwards)
    return model

  def at(self, budget: float) -> Runnable:
    """The model at the ratio whose average bits, by its order, are the budget."""
    model, ratio, network = self.model, (8 - budget) / 4, self.start.network
    share = model.schedule.mac_share(ratio)
    low = sum(layer.macs for layer in self.start.layers) * share
    # Stored are 8-bit codes, whatever it runs at.
    took = sizes(network.layers, {}, None, 8)
    took["bitops"] -= low * (8 * 8 - 4 * 4) / 1e9
    return Runnable(predict=lambda x: model(x, ratio), avg_bits=8 - 4 * share, sizes=took)


class FlexiQGreedy(FlexiQ):
  """The groups in order of error per MAC."""

  name = "flexiq_greedy"
  greedy = True
