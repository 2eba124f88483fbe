"""What a method is asked for: which bits may be chosen, what limits them, what else is fixed."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from flexiq_jax.graph import Layer
from flexiq_jax.methods.layerwise import FLOAT

TOLERANCE = 0.05  # of average bits, and of the share in 8 bits

Unit = Literal["average bits", "size", "share in 8 bits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Which bits may be chosen, and what a budget is.

  Average bits are a mean over the MACs of the layers that may be lowered; size is the share of what
  these layers take with 8-bit weights; the share in 8 bits is that of their MACs, at least.

  Attributes:
    bits: widths of weights that may be chosen, ascending; `FLOAT` for floating point.
    activation_bits: width of the inputs of these layers, None: as the weights.
    per_channel: a weight scale for each output channel, not for each layer.
    kept: bits of all other layers.
    unit: what budgets are.
    layers_only: whether each layer takes one of `bits`. Otherwise other ways to spend the same bits
      are asked for, too: other widths, and parts of layers.
  """

  bits: tuple[int, ...]
  activation_bits: int | None
  per_channel: bool
  kept: int
  unit: Unit
  layers_only: bool = True

  @property
  def widths(self) -> tuple[int, ...]:
    """The bits that are not floating point."""
    return tuple(b for b in self.bits if b != FLOAT)

  @property
  def cost(self) -> str:
    """Which cost a budget limits: size, or average bits."""
    return "size" if self.unit == "size" else "average bits"

  def limit(self, budget: float) -> float:
    """The most that a plan may have: average bits, or size."""
    if self.unit == "share in 8 bits":
      return FLOAT - (FLOAT - 8) * budget
    return budget

  def missed(self, budget: float, average: float) -> bool:
    """Whether a plan's average bits are further from a budget than `TOLERANCE`."""
    off = abs(average - self.limit(budget))
    if self.unit == "share in 8 bits":
      off /= FLOAT - 8
    return self.unit != "size" and off > TOLERANCE


def sizes(
  layers: Iterable[Layer], bits: Mapping[str, int], activation_bits: int | None, kept: int
) -> dict[str, float]:
  """What a model takes.

  Args:
    layers: all of them.
    bits: layer -> bits, of the layers that were chosen for.
    activation_bits: width of the inputs of these layers, None: as the weights.
    kept: bits of all other layers, inputs as well.

  Returns:
    `bitops`, 1e9 bit operations an example, MACs times bits of both operands; `size`, MB of 2^20
    bytes.
  """
  operations = size = 0.0
  for layer in layers:
    w = bits.get(layer.name, kept)
    a = w if activation_bits is None or layer.name not in bits else activation_bits
    operations += layer.macs * w * a
    size += layer.params * w / 8
  return {"bitops": operations / 1e9, "size": size / 2**20}
