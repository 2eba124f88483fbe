"""What methods that train on labelled images share: steps that can be killed, and what they cost.

Training goes on where its last checkpoint is (`training.loop`), so what a killed run gives is what
another would have given. An epoch of the loop is what lies between two checkpoints, not a pass over
the training set.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import optax

from flexiq_jax.methods.base import Method
from flexiq_jax.methods.task import Task
from flexiq_jax.runs import files
from flexiq_jax.runs.progress import Progress
from flexiq_jax.training import is_whole, loop, require, require_positive

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSettings:
  """How long a method trains.

  Attributes:
    steps: optimizer steps; a multiple of `every`.
    batch_size: training images a step.
    learning_rate: the peak, from which half a cosine goes down to zero.
    every: steps between checkpoints, each with an entry in the log.
  """

  steps: int = 780
  batch_size: int = 64
  learning_rate: float = 1e-3
  every: int = 60

  def __post_init__(self):
    for field in ("steps", "batch_size", "every"):
      require(self, field, is_whole(getattr(self, field), 1), "an integer from 1")
    require_positive(self, "learning_rate")
    fits = self.steps % self.every == 0
    require(self, "steps", fits, f"a multiple of every ({self.every})")

  @property
  def rate(self) -> optax.Schedule:
    """The learning rate of a step."""
    return optax.cosine_decay_schedule(self.learning_rate, self.steps)


class Trained(Method):
  """A method that trains on labelled images; one training serves all budgets."""

  Settings = TrainedSettings

  @classmethod
  def fits(cls, task: Task) -> bool:
    """See `one_width`."""
    return one_width(task)

  def batches(self) -> loop.Data:
    """The training examples.

    Raises:
      ValueError: there are not as many as in a batch, or they have no labels.
    """
    size = self.settings.batch_size
    data = self.start.training(size)
    if not data.steps:
      raise ValueError(
        f"batch_size: {size}, but there are fewer training images; {self.name} trains on full "
        "batches"
      )
    _, labels = next(iter(data.epoch(1)))
    if labels is None:
      raise ValueError(f"training: the images have no labels, with which {self.name} trains")
    return data

  def train(
    self,
    data: loop.Data,
    loss: loop.Loss,
    params: Any,
    rest: Any,
    optimizer: optax.GradientTransformation,
    *,
    forwards: int,
  ) -> loop.State:
    """Trains, or reads back what was trained.

    Args:
      data: from `batches`, asked for before anything costs.
      loss: of batches (model input, labels); its metrics are averaged in the log.
      params: what is trained.
      rest: what is carried along.
      optimizer: with its schedule.
      forwards: forward passes in a step; a backward pass counts as two more of each.

    Raises:
      loop.DivergedError: the loss is not finite.
    """
    start, settings = self.start, self.settings
    shown = {"done": 0, "at": time.monotonic()}
    cost = 3 * forwards * settings.steps * settings.batch_size / len(start.x)

    def entry(epoch: loop.Epoch, state: loop.State) -> dict[str, Any]:
      del state
      means = {name: total / settings.every for name, total in epoch.totals.items()}
      return {"epoch": epoch.epoch, "step": epoch.step, "loss": epoch.loss, **means}

    with Progress(f"{self.name}, steps", settings.steps) as progress:

      def log(entry: dict[str, Any]) -> None:
        start.workdir.event("trained", table=start.table, method=self.name, **entry)
        now = time.monotonic()
        self.note(now - shown["at"], cost)
        progress.update(entry["step"] - shown["done"], f"loss {entry['loss']:.4f}")
        shown.update(done=entry["step"], at=now)

      state, _ = loop.train(
        loss,
        params,
        rest,
        optimizer,
        _Steps(data, settings.every),
        epochs=settings.steps // settings.every,
        seed=start.seed,
        entry=entry,
        run=files.to_plain(
          {
            "method": self.name,
            "settings": dataclasses.asdict(settings),
            "seed": start.seed,
            "weights": start.network.fingerprint,
            "layers": start.names,
          }
        ),
        checkpoint_dir=start.folder / self.name,
        progress=log,
        prepare=lambda key, batch: (start.prepare(key, batch[0]), batch[1]),
      )
    return state


def one_width(task: Task) -> bool:
  """Whether all layers may have one width: budgets are average bits, the others stay at 8 bits."""
  return task.unit == "average bits" and not task.layers_only and task.kept == 8


def within(widths: Sequence[int], budget: float) -> int:
  """The largest of some widths that keeps a budget of average bits.

  Raises:
    ValueError: none does.
  """
  if budget < min(widths):
    raise ValueError(f"budget: {budget:g} bits; the smallest that a width keeps is {min(widths)}")
  return max(width for width in widths if width <= budget)


@dataclasses.dataclass(frozen=True)
class _Steps:
  """`loop.Data`: so many batches between two checkpoints, pass after pass over the examples."""

  data: loop.Data
  steps: int

  def epoch(self, epoch: int) -> Iterator[Any]:
    left = self.steps
    done, skipped = divmod((epoch - 1) * left, self.data.steps)
    while left:
      for batch in itertools.islice(self.data.epoch(done + 1), skipped, skipped + left):
        left -= 1
        yield batch
      done, skipped = done + 1, 0
