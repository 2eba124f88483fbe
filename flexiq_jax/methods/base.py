"""The interface of methods: what one is given, what it gives, what it took.

    method = METHODS["clado"](start, settings)
    for answer in method.at(5.0): ...
    method.took()

A method spends a budget of bits on a calibrated model. Its file holds one class of it, which says

| part | what it is |
|---|---|
| `name` | as in a config and in results |
| `Settings` | what a config may say of it, with defaults |
| `fits` | which tasks it can be asked for |
| `widths` | bits that its plans have beside the task's, if any |
| `at` | for a budget: bits per layer (`Plan`), or a model that runs at it (`Runnable`) |
| `report` | what it shows of itself in a report, if anything |

A method that trains takes `Start.training`, keeps its checkpoints in `Start.folder` and gives a
`Runnable` for each budget. Work that costs goes through `measure`, which notes what it took where a
resumed run finds it.
"""

import abc
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flexiq_jax import graph
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.calibrated import Calibrated
from flexiq_jax.graph import Layer
from flexiq_jax.graph import trace as tracing
from flexiq_jax.methods import fusion, layerwise
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.program import Choices
from flexiq_jax.methods.task import Task
from flexiq_jax.network import Network
from flexiq_jax.runs.workdir import Workdir

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Bits per layer.

  Attributes:
    bits: layer -> bits, of the layers to choose for.
    seconds: what finding it took, beyond what was measured.
    columns: further columns of its row.
  """

  bits: dict[str, int]
  seconds: float = 0.0
  columns: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runnable:
  """A model that runs within a budget.

  Attributes:
    predict: examples `[B, ...]` -> logits `[B, K]`.
    avg_bits: mean bits over the MACs of the layers to choose for.
    sizes: as `task.sizes` gives them.
    seconds, columns: as those of `Plan`.
  """

  predict: Callable[[Array], Array]
  avg_bits: float
  sizes: Mapping[str, float]
  seconds: float = 0.0
  columns: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
    training: (batch size, epoch) -> full batches of shuffled training examples, for methods that
      train.
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
  training: Callable[[int, int], Iterator[Examples]]
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
  def stacks(self) -> layerwise.Stacks:
    """All layers of the model at the task's widths."""
    return self.stacks_of(self.task.widths)

  def stacks_of(self, bits: tuple[int, ...]) -> layerwise.Stacks:
    """All layers of the model at some widths, with the task's scales."""
    return layerwise.create(
      *(self.network.layers, self.network.weights),
      *(self.calibrated.observations.values, self.calibrated.ranges),
      bits=bits,
      activation_bits=self.task.activation_bits,
      per_channel=self.task.per_channel,
    )

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
  """A task's results, to be reported.

  Attributes:
    task, table: as in `Start`.
    title: heading of pictures.
    names: layers to choose for.
    budget: a budget as text.
    seeds: of the runs.
    workdirs: of the runs, each with a folder named as the table.
    folder: where pictures go.
  """

  task: Task
  table: str
  title: str
  names: Sequence[str]
  budget: Callable[[float], str]
  seeds: Sequence[int]
  workdirs: Sequence[Workdir]
  folder: Path


@dataclasses.dataclass(frozen=True)
class Details:
  """What a method shows of itself.

  Attributes:
    parts: (heading, Markdown).
    pictures: (caption, path).
    notes: sentences.
  """

  parts: tuple[tuple[str, str], ...] = ()
  pictures: tuple[tuple[str, Path], ...] = ()
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSettings:
  """A method of which a config says nothing."""


class Method(abc.ABC):
  """One method on one task.

  Attributes:
    name: of the method.
    Settings: a frozen dataclass, which raises a ValueError that begins with the field's name.
    family: methods of one family share what they measure, and report once; "" is the name.
    reference: whether it knows nothing of the model: others are compared with it.
    beside: names of methods that it is compared with on the same examples.
  """

  name: ClassVar[str]
  Settings: ClassVar[type[Any]] = NoSettings
  family: ClassVar[str] = ""
  reference: ClassVar[bool] = False
  beside: ClassVar[tuple[str, ...]] = ()

  def __init__(self, start: Start, settings: Any):
    """Keeps what it works on; measures nothing.

    Args:
      start: what it works on.
      settings: of `Settings`.
    """
    self.start, self.settings = start, settings

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Whether it can be asked for a task."""
    del task
    return True

  @classmethod
  def widths(cls, budgets: Sequence[float]) -> tuple[int, ...]:
    """Bits that its plans for some budgets may have beside the task's own."""
    del budgets
    return ()

  @abc.abstractmethod
  def at(self, budget: float) -> Sequence[Plan] | Runnable:
    """What it makes of a budget; of several plans, the mean counts.

    Raises:
      ValueError: nothing keeps the budget; names the smallest that something would keep.
    """

  @classmethod
  def report(cls, shown: Shown) -> Details:
    """What it shows of itself."""
    del shown
    return Details()

  def measure(self, forwards: float, work: Callable[[], Any]) -> Any:
    """Runs a measurement and notes what it took.

    Args:
      forwards: its cost in passes over the calibration examples.
      work: called once.
    """
    begin = time.monotonic()
    result = work()
    self.note(time.monotonic() - begin, forwards)
    return result

  def note(self, seconds: float, forwards: float) -> None:
    """Notes what a measurement took."""
    start, method = self.start, self.family or self.name
    start.workdir.event(
      "measured", table=start.table, method=method, seconds=seconds, forwards=forwards
    )

  def took(self) -> dict[str, float]:
    """What was measured: `seconds`, of all starts together, and `forwards`."""
    key = (self.start.table, self.family or self.name)
    events = [e for e in self.start.workdir.events("measured") if (e["table"], e["method"]) == key]
    return {
      "seconds": sum(e["seconds"] for e in events),
      "forwards": max((e["forwards"] for e in events), default=0.0),
    }
