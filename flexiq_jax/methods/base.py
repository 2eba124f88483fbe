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
`Runnable` for each budget, with `steps` among its columns (see trained.py). Work that costs goes
through `measure`, which notes what it took where a resumed run finds it.
"""

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flexiq_jax.methods.start import Start
from flexiq_jax.methods.task import Task
from flexiq_jax.runs.workdir import Workdir

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What a method makes of a budget.

  Attributes:
    seconds: what it took, beyond what was measured.
    columns: further columns of its row.
  """

  seconds: float = 0.0
  columns: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Answer):
  """Bits per layer.

  Attributes:
    bits: layer -> bits, of the layers to choose for.
  """

  bits: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runnable(Answer):
  """A model that runs within a budget.

  Attributes:
    predict: examples `[B, ...]` -> logits `[B, K]`.
    avg_bits: mean bits over the MACs of the layers to choose for.
    sizes: as `task.sizes` gives them.
  """

  predict: Callable[[Array], Array]
  avg_bits: float
  sizes: Mapping[str, float]


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
