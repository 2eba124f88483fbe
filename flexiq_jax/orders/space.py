"""`Space`: all channel groups of a model that may go to 4 bits, flat.

| symbol | meaning |
|---|---|
| T | channel groups in the whole model |
| J_l | groups of layer l; the layers' groups follow each other in the flat order |
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Space:
  """The selectable channel groups of a model.

  Attributes:
    names: layer names, in execution order.
    sizes: J_l per layer.
    layer: int32 `[T]`, number of the layer a group belongs to.
    cost: int64 `[T]`, MACs of one example that read the group's channels, in units of their
      greatest common divisor.
    unit: that divisor, in MACs.
    channels: int32 `[T]`, feature channels in the group.
  """

  names: tuple[str, ...]
  sizes: tuple[int, ...]
  layer: np.ndarray
  cost: np.ndarray
  unit: int
  channels: np.ndarray

  @classmethod
  def create(
    cls, names: Sequence[str], channels: Sequence[Sequence[int]], macs_per_channel: Sequence[int]
  ) -> "Space":
    """Builds a space.

    Args:
      names: layer names.
      channels: for each layer the number of channels in each of its groups.
      macs_per_channel: for each layer the MACs of one example that read one channel.

    Raises:
      ValueError: no groups, repeated names, a group without channels or cost, lengths that differ,
        or a total cost that int32 cannot hold (a search counts in int32).
    """
    if not len(names) == len(channels) == len(macs_per_channel):
      raise ValueError(
        f"names, channels, macs_per_channel: of {len(names)}, {len(channels)} and "
        f"{len(macs_per_channel)} layers; expected one entry each for every layer"
      )
    if len(set(names)) < len(names):
      raise ValueError(f"names: {max(names, key=list(names).count)!r} is there more than once")
    for name, groups, macs in zip(names, channels, macs_per_channel, strict=True):
      if macs < 1 or min(groups, default=1) < 1:
        raise ValueError(
          f"channels, macs_per_channel: layer {name} has {macs} MACs a channel and a group of "
          f"{min(groups, default=1)} channels; expected at least 1 of each"
        )
    sizes = tuple(len(c) for c in channels)
    if not sum(sizes):
      raise ValueError("channels: no channel group may go to 4 bits; every layer stays 8-bit")
    layer = np.repeat(np.arange(len(names), dtype=np.int32), sizes)
    flat = np.concatenate([np.asarray(c, np.int32) for c in channels])
    macs = flat.astype(np.int64) * np.asarray(macs_per_channel, np.int64)[layer]
    unit = math.gcd(*(int(m) for m in np.unique(macs)))
    cost = macs // unit
    if cost.sum() > _INT32_MAX:
      raise ValueError(
        f"macs_per_channel: the total cost {cost.sum()} (in units of {unit} MACs) is over int32; "
        "use larger groups"
      )
    return cls(tuple(names), sizes, layer, cost, unit, flat)

  def __repr__(self) -> str:
    return f"Space({self.total} groups of {len(self.names)} layers)"

  @property
  def total(self) -> int:
    """T, the number of groups."""
    return len(self.layer)

  def split(self, flat: Any) -> dict[str, Any]:
    """Values per group `[T]` -> `{layer name: [J_l]}`; works for traced arrays, too."""
    bounds = np.cumsum((0, *self.sizes))
    return {
      name: flat[int(a) : int(b)]
      for name, a, b in zip(self.names, bounds[:-1], bounds[1:], strict=True)
    }

  def join(self, per_layer: Mapping[str, np.ndarray]) -> np.ndarray:
    """`{layer name: [J_l]}` -> values per group `[T]`.

    Raises:
      ValueError: a layer is missing, or has another number of groups.
    """
    for name, size in zip(self.names, self.sizes, strict=True):
      if name not in per_layer:
        raise ValueError(f"per_layer: layer {name} is missing")
      if len(per_layer[name]) != size:
        raise ValueError(
          f"per_layer: layer {name} has {len(per_layer[name])} values for {size} groups"
        )
    return np.concatenate([np.asarray(per_layer[name]) for name in self.names])

  def index(self, name: str, group: int) -> int:
    """Flat number of a layer's group.

    Raises:
      ValueError: no such layer, or no such group in it.
    """
    if name not in self.names:
      raise ValueError(f"name: no layer {name!r} in this space")
    layer = self.names.index(name)
    if not 0 <= group < self.sizes[layer]:
      raise ValueError(f"group: {group} is not in 0..{self.sizes[layer] - 1}, layer {name}")
    return sum(self.sizes[:layer]) + group
