"""What the TPU kernel multiplies and keeps at a group size, from a model's shapes alone.

A shift block takes a multiple of the kernel's rows of K (`layouts`). Small groups, each a block of
its own, are therefore mostly padding: what is accurate is not what a kernel affords.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from flexiq_jax.deployment import layouts, patches
from flexiq_jax.deployment.build import slides
from flexiq_jax.deployment.wiring import mixed_layers
from flexiq_jax.graph import tracing
from flexiq_jax.kernels.tpu import LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padded:
  """Relative to the layers without padding, in 8 bits.

  Attributes:
    rows: products, at any ratio; 4 bits gain where this is below the gain of a product in 4 bits,
      which is 2.
    bytes: of the weights, whose codes are kept in 8 and in 4 bits.
  """

  rows: float
  bytes: float


def padded(
  traced: tracing.Traced,
  names: Collection[str],
  *,
  group_size: int,
  shift_block: int = 0,
  granule: int = LANES,
) -> Padded:
  """The padding of the layers that may run in 4 bits.

  Args:
    traced: the model.
    names: of those layers; the ones that have no kernel are left out.
    group_size: channels of a group.
    shift_block: channels of a shift block; 0: each group is one.
    granule: rows of K of which the kernel takes multiples.
  """
  windows = patches.windows(traced)
  products = padded_products = weights = padded_weights = 0.0
  for name, layer in mixed_layers(traced, {*names}).items():
    channels = np.arange(layer.in_channels)
    group = channels // group_size
    grouped = _Groups(group=group, block=channels // max(group_size, shift_block))
    lay = layouts.lay_out(
      layer, grouped, np.arange(group[-1] + 1), granule, slides(windows.get(name))
    )
    more = lay.rows / (layer.in_channels * lay.window)
    products += layer.macs
    padded_products += layer.macs * more
    weights += layer.params
    padded_weights += layer.params * more
  if not products:
    raise ValueError(f"names: none of {', '.join(names) or 'no layer'} has a kernel")
  return Padded(rows=padded_products / products, bytes=1.5 * padded_weights / weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Groups:
  """What a layout reads of a layer's 4-bit side."""

  group: Any
  block: Any
