"""What methods start from: a calibrated model, labelled examples, and what is asked for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexiq_jax import graph
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.calibrated import Calibrated
from flexiq_jax.graph import Layer, tracing
from flexiq_jax.methods import fusion, layerwise
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.program import Choices
from flexiq_jax.methods.task import Task
from flexiq_jax.network import Network
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.training import loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """What methods start from: one model, one seed, one task.

  Attributes:
    task: what is asked for.
    table: its name, for what is noted.
    calibrated: the model, batch norm folded, with its calibration statistics.
    apply, params: the float model, batch norm unfolded.
    names: layers to choose for, in execution order.
    x: calibration examples in one array `[n, ...]`.
    examples: those of them, with labels, that losses and gradients are measured on.
    seed: of what is drawn.
    workdir: of the run, where it is noted what was measured.
    folder: for files of this task.
    order: FlexiQ's model in greedy order (True) or as searched (False), and the forward passes of
      the search, None where the order was read back.
    training: batch size -> shuffled training examples in full batches, for methods that train:
      (images, labels int `[B]` or None), the images as `prepare` takes them.
    prepare: (random key, images) -> what the model takes: augmentation, normalisation; can be
      jitted.
  """

  task: Task
  table: str
  calibrated: Calibrated
  apply: graph.Apply
  params: Any
  names: tuple[str, ...]
  x: np.ndarray
  examples: Examples
  seed: int
  workdir: Workdir
  folder: Path
  order: Callable[[bool], tuple[AdaptiveModel, float | None]]
  training: Callable[[int], loop.Data]
  prepare: Callable[[Any, Any], Any]
  _shared: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def network(self) -> Network:
    """The float model, batch norm folded."""
    return self.calibrated.network

  @property
  def share(self) -> float:
    """Of the calibration examples, how many are measured on; in 0..1."""
    return len(self.examples) / len(self.x)

  @functools.cached_property
  def layers(self) -> tuple[Layer, ...]:
    """The layers to choose for."""
    return tuple(layer for layer in self.network.layers if layer.name in self.names)

  @functools.cached_property
  def choices(self) -> Choices:
    """The options, with the costs `average bits` and `size`, as shares of all layers to choose."""
    macs = np.array([layer.macs for layer in self.layers], np.float64)
    size = np.array([layer.params for layer in self.layers], np.float64)
    costs = {
      "average bits": np.multiply.outer(macs / macs.sum(), self.task.bits),
      "size": np.multiply.outer(size / size.sum() / 8, self.task.bits),
    }
    return Choices.create([layer.name for layer in self.layers], self.task.bits, costs)

  @functools.cached_property
  def kept(self) -> tuple[str, ...]:
    """All other layers, which stay at the task's `kept` bits."""
    return tuple(layer.name for layer in self.network.layers if layer.name not in self.names)

  @property
  def stacks(self) -> layerwise.Stacks:
    """All layers of the model at the task's widths."""
    return self.stacks_of(self.task.widths)

  def stacks_of(self, bits: tuple[int, ...]) -> layerwise.Stacks:
    """All layers of the model at some widths, with the task's scales."""

    def make() -> layerwise.Stacks:
      return layerwise.create(
        *(self.network.layers, self.network.weights),
        *(self.calibrated.observations.values, self.calibrated.ranges),
        bits=bits,
        activation_bits=self.task.activation_bits,
        per_channel=self.task.per_channel,
      )

    return self.once(f"stacks {bits}", make)

  @functools.cached_property
  def operations(self) -> tuple[fusion.Operation, ...]:
    """The operations of the float model, batch norm unfolded."""
    return fusion.operations(tracing.trace(self.apply, self.params, self.x[:1]))

  def average(self, bits: Mapping[str, int]) -> float:
    """MAC-weighted mean of a plan's bits."""
    return sum(layer.macs * bits[layer.name] for layer in self.layers) / sum(
      layer.macs for layer in self.layers
    )

  def with_float(self, harm: np.ndarray) -> np.ndarray:
    """What layers do at each width `[I * widths]`, and that they do nothing in floating point."""
    harm = harm.reshape(len(self.layers), -1)
    exact = np.zeros((len(harm), len(self.task.bits) - harm.shape[1]))
    return np.concatenate([harm, exact], axis=1).ravel()

  def once(self, key: str, make: Callable[[], Any]) -> Any:
    """Makes something at the first call, for all methods that share it."""
    if key not in self._shared:
      self._shared[key] = make()
    return self._shared[key]
