"""How many bytes a deployed model takes, beside float32 and INT8.

The deployed model holds the weights of its mixed layers twice, as 8-bit and as packed 4-bit codes:
12 bits per weight, where INT8 and FlexiQ's GPU kernel have 8. In return a kernel reads
each channel at the width in use.
"""

import dataclasses
import math
from typing import Any

import jax

from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.deployment.model import Deployed
from flexiq_jax.graph import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Bytes.

  Attributes:
    device: all arrays of the deployed model.
    codes: of these, weight codes of both widths, padding included.
    float32: the float model.
    int8: the float model with the layers' weights in one byte each.
    weights: number of weights in layers (a count, not bytes).
  """

  device: int
  codes: int
  float32: int
  int8: int
  weights: int

  @property
  def bits_per_weight(self) -> float:
    """Bits of codes for each weight, padding included."""
    return 8 * self.codes / self.weights


def sizes(deployed: Deployed, x: Any) -> Sizes:
  """Sizes of a deployed model.

  Args:
    deployed: the model.
    x: example input(s), arrays or `jax.ShapeDtypeStruct`s.
  """
  weights = sum(layer.params for layer in layers(deployed.wiring.apply, deployed.wiring.params, x))
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(deployed.wiring.params))
  codes = 0
  for d in deployed.layers.values():
    if isinstance(d, Mixed):
      codes += d.weights.w8.nbytes + d.weights.w4.nbytes
    else:
      codes += d.q.w.nbytes + (d.q.low.w.nbytes if d.q.low is not None else 0)
  return Sizes(
    device=sum(leaf.nbytes for leaf in jax.tree.leaves(deployed)),
    codes=codes,
    float32=4 * total,
    int8=weights + 4 * (total - weights),
    weights=weights,
  )
