"""Result rows: one evaluation each, written to the workdir as soon as it is complete."""

from collections.abc import Callable
from typing import Any

from experiments.shared import setup
from flexiq_jax import evaluation
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.runs import distributed
from flexiq_jax.runs.workdir import Workdir


class Rows:
  """Evaluates methods on the evaluation images; a row that is in the workdir is left alone.

  Of several processes the main one evaluates.
  """

  def __init__(self, inputs: setup.Inputs, workdir: Workdir):
    """Keeps what every row needs.

    Args:
      inputs: what `setup.prepare` made of the config.
      workdir: of the run.
    """
    self._inputs, self._workdir = inputs, workdir

  def add(
    self,
    method: str,
    ratio: float | None,
    seed: int | None,
    predict: Callable[[Any], Any],
    **columns: float,
  ) -> None:
    """Evaluates one row.

    Args:
      method: its name in the table.
      ratio: 4-bit ratio, None where the method knows none.
      seed: of the run or of a random order.
      predict: images `[B, H, W, C]` -> logits `[B, K]`.
      **columns: further columns of the row.
    """
    if not distributed.is_main() or self._workdir.has(method, ratio, seed):
      return
    label = method if ratio is None else f"{method} at {100 * ratio:g} %"
    with self._inputs.shown_batches(label) as batches:
      try:
        top1, images = evaluation.top1(predict, batches)
      except ValueError as error:
        if str(error).startswith("config."):
          raise
        raise ValueError(f"{label}: {error}") from error
    self._workdir.row(
      method, ratio, seed, top1=top1, images=images, **self._drops(method, top1), **columns
    )

  def add_adaptive(self, method: str, model: AdaptiveModel, ratio: float, seed: int | None) -> None:
    """Evaluates an adaptive model at one ratio."""
    self.add(method, ratio, seed, lambda x: model(x, ratio), **shares(model, ratio))

  def _drops(self, method: str, top1: float) -> dict[str, float]:
    """Columns drop_float and drop_int8, as far as the rows they refer to are there."""
    reference = {r["method"]: r["top1"] for r in self._workdir.rows() if r["ratio"] is None}
    reference[method] = top1
    return {
      column: reference[row] - top1
      for column, row in (("drop_float", "float"), ("drop_int8", "uniform_int8"))
      if row == method or (row in reference and method != "float")
    }


def shares(model: AdaptiveModel, ratio: float) -> dict[str, float]:
  """Columns of a row: what of an adaptive model is in 4 bits at a ratio."""
  share = model.schedule.mac_share(ratio)
  return {
    "avg_bits": 8 - 4 * share,
    "mac_share": share,
    "channel_share": model.schedule.channel_share(ratio),
  }
