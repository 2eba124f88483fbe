"""CLADO and its variants as methods, which share one measurement.

Its losses, the long part, are kept as checkpoints (`sensitivity/`) while they are measured and
after that.

Where layers may stay in floating point, the cross-entropy does not tell them apart: on ResNet-20, 8
bits in one layer lower it about as often as they raise it, and what a pair of layers adds is as
large and of either sign. There the diagonal alone is measured, with the divergence from the float
model's prediction, which is never negative, whatever `loss` says; pairs, whose number grows with
the square of the layers', are not.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from flexiq_jax.methods import fusion
from flexiq_jax.methods.base import Details, Shown
from flexiq_jax.methods.clado import matrix
from flexiq_jax.methods.clado.losses import LayerLosses
from flexiq_jax.methods.clado.suffixes import LOSSES
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.programmed import Programmed, ProgramSettings
from flexiq_jax.methods.start import Start
from flexiq_jax.methods.task import Task
from flexiq_jax.quant import check_one_of
from flexiq_jax.runs import plots
from flexiq_jax.runs.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class CladoSettings(ProgramSettings):
  """What CLADO is told.

  Attributes:
    loss: cross_entropy, or kl from the float model's prediction.
    clip: takes losses below the float model's for no change.
  """

  loss: str = "cross_entropy"
  clip: bool = False

  def __post_init__(self):
    super().__post_init__()
    check_one_of("loss", self.loss, tuple(LOSSES))


class Clado(Programmed):
  """Pairs of layers by their measured losses, projected."""

  name = "clado"
  family = "clado"
  Settings = CladoSettings
  beside = ("clado_diagonal",)

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Pairs are measured among widths only."""
    return has_pairs(task)

  def measured(self) -> np.ndarray:
    """The objective of this variant, from the measurement of all."""
    objectives: Mapping[str, np.ndarray] = self.start.once("clado", self._objectives)
    return objectives[self.name]

  def _objectives(self) -> dict[str, np.ndarray]:
    """Objectives of all variants."""
    start, settings, losses = self.start, self.settings, self.losses()
    if not has_pairs(start.task):
      return {"clado_diagonal": start.with_float(losses.singles - losses.base)}
    choices = start.choices
    g = matrix.matrix(choices, losses, clip=settings.clip)
    projected, clipped = matrix.project(g)
    blocks, clipped_blocks = matrix.project(matrix.block_wise(choices, g, blocks_of(start)))
    np.savez(start.folder / "clado.npz", g=g, projected=projected)
    check = matrix.check_unconstrained(
      choices, projected, time_limit=settings.time_limit, seed=start.seed
    )
    start.workdir.event(
      "unconstrained",
      table=start.table,
      clipped=clipped,
      clipped_blocks=clipped_blocks,
      disagree=check.disagree,
      highest=check.highest,
      least=check.least,
    )
    return {"clado": projected, "clado_block": blocks, "clado_diagonal": matrix.diagonal(g)}

  def losses(self) -> matrix.Losses:
    """The losses, measured or read back."""
    start, pairs = self.start, has_pairs(self.start.task)
    measurement = LayerLosses(
      *(start.network, start.stacks, start.choices.names),
      loss=self.settings.loss if pairs else "kl",
      block=self.settings.block,
      pairs=pairs,
    )

    def work() -> matrix.Losses:
      with Checkpoints(start.folder / "sensitivity", keep=1) as checkpoints:
        return measurement.measure(
          start.examples,
          checkpoints=checkpoints,
          show=lambda line: print(f"seed {start.seed}, {start.table}: {line}", flush=True),
        )

    return self.measure(start.share * measurement.forwards, work)

  @classmethod
  def report(cls, shown: Shown) -> Details:
    """The matrix of the first run, and what it says of all layers at the highest bits."""
    notes, pictures = [], []
    for seed, workdir in zip(shown.seeds, shown.workdirs, strict=True):
      for event in workdir.events("unconstrained"):
        if event["table"] != shown.table:
          continue
        lower = ", ".join(f"`{n}` to {b}" for n, b in event["disagree"].items())
        said = f"would lower {lower}, though bits cost nothing" if lower else "is 8 bits everywhere"
        notes.append(
          f"CLADO, {shown.table}, seed {seed}: the unconstrained optimum {said}; the projection "
          f"clipped {100 * event['clipped']:.1f} % of the eigenvalues' magnitude."
        )
    path = shown.workdirs[0].path / shown.table / "clado.npz"
    if path.is_file():
      g = np.load(path)["g"]
      drawn = plots.cross_layer_matrix(
        shown.folder / f"{shown.table}_matrix.png",
        *(shown.names, shown.task.bits, g),
        title=shown.title,
      )
      pictures.append(("CLADO's matrix, first seed", drawn))
    return Details(pictures=tuple(pictures), notes=tuple(dict.fromkeys(notes)))


class CladoBlock(Clado):
  """The same with interactions inside of blocks only."""

  name = "clado_block"
  beside = ()


class CladoDiagonal(Clado):
  """The same without interactions."""

  name = "clado_diagonal"
  beside = ()

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Single layers are measured everywhere."""
    del task
    return True


def has_pairs(task: Task) -> bool:
  """Whether pairs are measured."""
  return FLOAT not in task.bits


def blocks_of(start: Start) -> dict[str, int]:
  """Layer -> number of its block; a block ends with a residual addition."""
  found, block, number = start.operations, {}, 0
  for node in fusion.nodes(found, "residual"):
    if node.layer in start.names:
      block[node.layer] = number
    number += any(found[i].kind == "add" for i in node.operations)
  return block
