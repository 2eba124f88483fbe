"""A calibrated model, and its channel groups: what every search, method and training starts from.

    calibrated = calibrate(network, batches, RangeSettings())
    grouped = calibrated.group(names, LowSettings())
    model = grouped.ordered(orders.greedy(grouped.space, grouped.scores()))

Steps B to F of docs/flexiq.md.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax import adaptive, orders
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, Space, recipes
from flexiq_jax.quant import (
  Groups,
  LowSettings,
  PassListener,
  RangeSettings,
  Values,
  calibration,
  grouping,
  rules,
)

Array = Any


@dataclasses.dataclass(frozen=True)
class Observations:
  """What calibration examples showed of a network.

  Attributes:
    values: layer name -> histogram of its input in the float model.
    codes: layer name -> int64 `[C, 256]` histogram of 8-bit codes in the 8-bit model.
  """

  values: Mapping[str, Values] = dataclasses.field(repr=False)
  codes: Mapping[str, np.ndarray] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Calibrated:
  """A float model, what calibration showed of it, and the 8-bit model that follows.

  Attributes:
    network: the float model.
    batches: what it was calibrated on, `[B, ...]` each, training data; iterated over several times.
    observations: what that showed.
    ranges: how clipping ranges are found.
  """

  network: Network
  batches: Iterable[Array] = dataclasses.field(repr=False)
  observations: Observations
  ranges: RangeSettings = dataclasses.field(default_factory=RangeSettings)

  @functools.cached_property
  def base(self) -> dict[str, rules.QLayer]:
    """All layers at 8 bits."""
    return self.uniform(8)

  def uniform(self, bits: int, keep8: Sequence[str] = ()) -> dict[str, rules.QLayer]:
    """All layers at one width, those in `keep8` (names) at 8 bits."""
    return calibration.quantize(
      *(self.network.layers, self.network.weights, self.observations.values),
      *(self.ranges, bits, keep8),
    )

  def group(self, names: Sequence[str], settings: LowSettings) -> "Grouped":
    """Channel groups and shifts of the layers `names` (see `grouping.group_channels`)."""
    network = self.network
    runs = network.runs if settings.whole_heads else {}
    groups = {
      name: grouping.group_channels(
        *(network.layer(name), self.base[name], self.observations.codes[name], settings),
        # Where the order is fixed (0), channels are gathered, and any order does.
        max(1, runs.get(name, 1)),
      )
      for name in names
    }
    return Grouped(self, groups, settings)


@dataclasses.dataclass(frozen=True)
class Grouped:
  """The channel groups of a calibrated model, each with its shifts.

  Attributes:
    calibrated: the model.
    groups: layer name -> its groups; only layers that may go to 4 bits.
    settings: how channels are grouped and lowered.
  """

  calibrated: Calibrated
  groups: Mapping[str, Groups]
  settings: LowSettings

  def __repr__(self) -> str:
    return f"Grouped({self.space.total} groups of {len(self.groups)} layers)"

  @functools.cached_property
  def model(self) -> dict[str, rules.QLayer]:
    """The 8-bit layers, grouped ones with their 4-bit side, each group with its own shifts."""
    network = self.calibrated.network
    return grouping.lower_layers(network.layers, self.calibrated.base, self.groups, self.settings)

  @functools.cached_property
  def space(self) -> Space:
    """The search space over the groups."""
    return adaptive.space(self.calibrated.network, self.groups)

  def scores(self, exact: bool = True, progress: PassListener | None = None) -> np.ndarray:
    """Error of each group alone, float64 `[T]`: over the calibration batches, or closed-form."""
    if not exact:
      return orders.range_scores(self.space, self.groups)
    calibrated, kept = self.calibrated, self.__dict__
    if "_scores" not in kept:  # a pass over the batches, and a search starts from them again
      kept["_scores"] = adaptive.scores(
        calibrated.network, self.model, self.space, calibrated.batches, progress
      )
    return kept["_scores"]

  def ordered(self, order: np.ndarray, levels: Iterable[float] = recipes.LEVELS) -> AdaptiveModel:
    """The model whose groups go to 4 bits in an order.

    Without shift blocks, groups keep their shifts. With them, the groups of a shift block get
    shifts in common (`grouping.reshift`), and groups that no level tells apart are sorted by the
    shift that they had, so that blocks are homogeneous (`orders.sorted_within`).

    Args:
      order: int `[T]`, in which groups go to 4 bits.
      levels: ratios at which the groups in 4 bits stay exactly those of `order`.
    """
    calibrated, settings = self.calibrated, self.settings
    network = calibrated.network
    schedule, cuts, model = Schedule(self.space, order), self.groups, self.model
    if settings.shift_block:
      shifts = self.space.join({name: g.x_shift for name, g in cuts.items()})
      schedule = orders.sorted_within(schedule, levels, shifts)
      cuts = {
        name: grouping.reshift(
          *(network.layer(name), calibrated.base[name], calibrated.observations.codes[name]),
          cuts[name].channels,
          orders.shift_blocks(
            layout, orders.groups_per_block(cuts[name].channels, settings.shift_block)
          ),
          settings,
        )
        for name, layout in schedule.layer_order().items()
      }
      model = grouping.lower_layers(network.layers, calibrated.base, cuts, settings)
    return AdaptiveModel(
      *(network, model, schedule, cuts, calibrated.ranges, settings), grouped=self
    )


def calibrate(
  network: Network,
  batches: Iterable[Array],
  ranges: RangeSettings | None = None,
  progress: PassListener | None = None,
) -> Calibrated:
  """Runs the calibration passes (see `quant.calibration`).

  Args:
    network: the float model.
    batches: inputs `[B, ...]` from training data; iterated over several times.
    ranges: how clipping ranges are found.
    progress: called as `progress(pass name, examples done)`.
  """
  ranges = ranges or RangeSettings()
  apply, params, platform = network.apply, network.params, network.platform
  values = calibration.observe_values(apply, params, batches, progress)
  model = calibration.quantize(network.layers, network.weights, values, ranges)
  codes = calibration.observe_codes(apply, params, model, batches, progress, platform)
  return Calibrated(network, batches, Observations(values, codes), ranges)
