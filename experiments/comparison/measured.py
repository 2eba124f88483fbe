"""What the layer-wise methods of a comparison start from, for one seed."""

import dataclasses
from typing import Any

import numpy as np

from experiments.comparison.sections import Section
from flexiq_jax import graph
from flexiq_jax.calibrated import Calibrated
from flexiq_jax.graph import trace as tracing
from flexiq_jax.methods import fusion, layerwise
from flexiq_jax.network import Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """What the methods of one seed start from.

  Attributes:
    calibrated: the model, batch norm folded, with its calibration statistics.
    apply, params: the float model, batch norm unfolded.
    selectable: layers to choose for.
    images, labels: calibration images in one array, and what they show.
    sensitivity: how many of them, from the first, CLADO, MPQCO and HAWQ-v3 measure on.
    seed: of what is drawn.
  """

  calibrated: Calibrated
  apply: graph.Apply
  params: Any
  selectable: tuple[str, ...]
  images: np.ndarray
  labels: np.ndarray
  sensitivity: int
  seed: int

  @property
  def network(self) -> Network:
    """The float model, batch norm folded."""
    return self.calibrated.network

  @property
  def sensitivity_set(self) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that losses and gradients are measured on."""
    return self.images[: self.sensitivity], self.labels[: self.sensitivity]

  def stacks(self, section: Section, bits: tuple[int, ...] | None = None) -> layerwise.Stacks:
    """All layers at some widths, or the section's own ones, with the section's scales."""
    return layerwise.create(
      *(self.network.layers, self.network.weights),
      *(self.calibrated.observations.values, self.calibrated.ranges),
      bits=bits or section.widths,
      activation_bits=section.activation_bits,
      per_channel=section.per_channel,
    )

  def _operations(self) -> tuple[fusion.Operation, ...]:
    return fusion.operations(tracing.trace(self.apply, self.params, self.images[:1]))

  def blocks(self) -> dict[str, int]:
    """Layer -> number of its block; a block ends with a residual addition."""
    found, block, number = self._operations(), {}, 0
    for node in fusion.nodes(found, "residual"):
      if node.layer in self.selectable:
        block[node.layer] = number
      number += any(found[i].kind == "add" for i in node.operations)
    return block

  def tied(self) -> tuple[tuple[str, ...], ...]:
    """Layers whose results meet in an addition with nothing but a norm between."""
    found, tied = self._operations(), []
    for operation in found:
      if operation.kind == "add":
        ends = [found[p] for p in operation.inputs]
        ends = [found[o.inputs[0]] if o.kind == "norm" else o for o in ends]
        if len(names := [o.layer for o in ends if o.layer in self.selectable]) == 2:
          tied.append(tuple(names))
    return tuple(tied)
