"""One ratio, whatever comes: uniform INT8 is 0, INT4 is 1."""

import dataclasses

from flexiq_jax.serving.controllers.base import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
  """Always the same ratio.

  Attributes:
    ratio: in 0..1.
  """

  ratio: float
  switch_s: float = 0.0

  def __post_init__(self) -> None:
    """Raises ValueError where the ratio is none."""
    if not 0 <= self.ratio <= 1:
      raise ValueError(f"ratio: {self.ratio}; a number in 0..1 is accepted")

  @property
  def levels(self) -> tuple[float, ...]:
    """The one ratio."""
    return (self.ratio,)

  def start(self) -> None:
    """There is nothing to remember."""

  def step(self, state: None, seen: Seen) -> tuple[None, float]:
    """The ratio."""
    return None, self.ratio
