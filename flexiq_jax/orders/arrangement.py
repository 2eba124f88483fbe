"""The layout of a layer: its channel groups in schedule order, so that 4 bits are a prefix.

A *shift block* is a run of groups in that layout that shares its extraction shifts, because
hardware applies one shift to many channels at once (docs/flexiq.md, step F). The order within a
layer is free between two levels at which the model is run: no mask changes. It is used to put
groups next to each other that want the same shift.
"""

from collections.abc import Iterable, Sequence, Sized

import numpy as np

from flexiq_jax.orders.schedule import Schedule


def groups_per_block(groups: Sequence[Sized], shift_block: int) -> int:
  """How many of a layer's groups, next to each other in its layout, share their shifts.

  Args:
    groups: the layer's channel groups; all but the last are of one length, the longest.
    shift_block: channels that share their shifts; 0 shares none.
  """
  return max(1, shift_block // max(map(len, groups)))


def shift_blocks(layout: np.ndarray, groups_per_block: int) -> np.ndarray:
  """The shift block of each group of a layer.

  Args:
    layout: int `[J]`, the layer's groups in schedule order (`Schedule.layer_order`).
    groups_per_block: so many groups, from the front, are a block; the last one may be short.

  Returns:
    int32 `[J]`, number of each group's block, counted along the layout.
  """
  blocks = np.empty(len(layout), np.int32)
  blocks[layout] = np.arange(len(layout)) // groups_per_block
  return blocks


def sorted_within(schedule: Schedule, levels: Iterable[float], shifts: np.ndarray) -> Schedule:
  """Sorts each layer's groups by shift wherever no level tells them apart.

  Only groups of one layer, one interval between neighbouring levels and one cost change places. The
  cost at each place of the order therefore stays what it was, and with it how many groups any
  ratio takes; which ones, at the levels.

  Args:
    schedule: any schedule.
    levels: ratios whose masks stay as they are.
    shifts: int `[T]`, the shift that each group wants.
  """
  space, order = schedule.space, schedule.order
  places = np.arange(space.total)
  interval = np.searchsorted(sorted(schedule.prefix(r) for r in levels), places, side="right")
  alike = (space.cost[order], space.layer[order], interval)  # the last key leads
  mixed = np.empty_like(order)
  mixed[np.lexsort((places, *alike))] = order[np.lexsort((order, shifts[order], *alike))]
  return Schedule(space, mixed)
