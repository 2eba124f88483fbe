"""What PTMQ is told."""

import dataclasses

from flexiq_jax.methods.anyprecision import require_widths
from flexiq_jax.training import is_real, is_whole, require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtmqSettings:
  """How blocks are reconstructed.

  Attributes:
    steps: of each block.
    batch_size: calibration images a step.
    groups: the low, the middle and the high width.
    weight_bits: widths that weights are drawn from at each step, among `groups`; empty: all.
    rounding_rate: Adam's learning rate of the rounding.
    scale_rate: that of the logarithms of activation scales, from which half a cosine goes down.
    shares: lambda, of low, middle and high width in the blend.
    gammas: weights of the losses.
    regularizer: weight of the regularizer of rounding, after a share `warmup` of the steps.
    warmup: in 0..1.
    float_share: how often an entry of a block's input is the float model's.
  """

  steps: int = 300
  batch_size: int = 32
  groups: tuple[int, ...] = (4, 6, 8)
  weight_bits: tuple[int, ...] = ()
  rounding_rate: float = 1e-2
  scale_rate: float = 4e-3
  shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
  gammas: tuple[float, ...] = (100.0, 100.0, 100.0)
  regularizer: float = 0.01
  warmup: float = 0.2
  float_share: float = 0.5

  def __post_init__(self):
    for field in ("steps", "batch_size"):
      require(self, field, is_whole(getattr(self, field), 1), "an integer from 1")
    require_widths(self, "groups")
    require(self, "groups", len(self.groups) == 3, "three ascending widths of 2..8")
    if self.weight_bits:
      require_widths(self, "weight_bits")
    fits = set(self.weight_bits) <= set(self.groups)
    require(self, "weight_bits", fits, f"widths of groups {self.groups}")
    for field in ("rounding_rate", "scale_rate", "regularizer"):
      require_positive(self, field)
    for field in ("shares", "gammas"):
      values = getattr(self, field)
      fits = isinstance(values, tuple | list) and len(values) == 3
      fits = fits and all(is_real(value) and value >= 0 for value in values)
      require(self, field, fits, "three numbers from 0")
    for field in ("warmup", "float_share"):
      value = getattr(self, field)
      require(self, field, is_real(value) and 0 <= value <= 1, "a number in 0..1")

  @property
  def drawn(self) -> tuple[int, ...]:
    """Numbers of the widths that weights are drawn from."""
    return tuple(self.groups.index(b) for b in self.weight_bits or self.groups)
