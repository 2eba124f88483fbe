"""The rows of one table and run: each a method at a budget, evaluated and written."""

import json
from typing import Any

import numpy as np

from experiments.comparison.tables import Table
from experiments.shared import setup
from experiments.shared.checks import field
from flexiq_jax import evaluation
from flexiq_jax.methods import Method, Plan, Runnable, Start
from flexiq_jax.methods.layerwise import Layerwise
from flexiq_jax.methods.task import sizes
from flexiq_jax.network import Network
from flexiq_jax.runs import files
from flexiq_jax.runs.workdir import Workdir


class Evaluator:
  """Evaluates models; those that run at any bits per layer are compiled once for several tables."""

  def __init__(self, inputs: setup.Inputs, network: Network, tables: tuple[Table, ...]):
    """Keeps what is needed.

    Args:
      inputs: what `setup.prepare` made of the config.
      network: the float model, batch norm folded.
      tables: all of the run.
    """
    self._inputs, self._tables, self.network = inputs, tables, network
    self._models: dict[Any, Layerwise] = {}

  def layerwise(self, table: Table, start: Start) -> Layerwise:
    """The model at any bits per layer of a table."""
    key = (table.activation_bits, table.per_channel)
    if key not in self._models:
      bits: set[int] = set()
      for other in self._tables:
        if (other.activation_bits, other.per_channel) == key:
          bits.update(other.widths)
          for method in other.methods.values():
            bits.update(method.widths(other.budgets))
      stacks = start.stacks_of(tuple(sorted(bits)))
      self._models[key] = Layerwise(
        self.network.apply, self.network.params, stacks, self.network.platform
      )
    return self._models[key]

  def correct(self, label: str, predict) -> np.ndarray:
    """Which evaluation images are classified rightly, bool `[n]`."""
    with self._inputs.shown_batches(label) as batches:
      return evaluation.correct(predict, batches)


class TableRows:
  """Adds rows to one table."""

  def __init__(self, table: Table, start: Start, evaluator: Evaluator):
    """Keeps what rows need.

    Args:
      table: the table.
      start: what its methods start from.
      evaluator: of the run.
    """
    self._table, self._start, self._evaluator = table, start, evaluator
    self._workdir: Workdir = start.workdir
    self._right: dict[tuple[int, ...], np.ndarray] = {}  # equal plans are evaluated once

  def add(self, method: Method, budget: float) -> None:
    """Asks a method, evaluates its answer and writes the row."""
    table = self._table
    label, ratio = table.label(method.name), table.ratio(budget)
    with field(f"config.comparison, {label} at {budget:g}"):
      answer = method.at(budget)
      right, columns = (
        self._runnable(answer, label, budget)
        if isinstance(answer, Runnable)
        else self._plans(method, answer, label, budget)
      )
    took = method.took()
    first = answer if isinstance(answer, Runnable) else answer[0]
    columns["seconds"] = took["seconds"] + first.seconds
    columns["forwards"] = took["forwards"]
    columns.update(first.columns)
    folder = self._start.folder / "correct"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{method.name}_{ratio:.6f}.npy", right)
    top1 = 100 * float(right.mean())
    float_top1 = next(r["top1"] for r in self._workdir.rows() if r["method"] == "float")
    if table.missed(budget, columns["avg_bits"]):
      columns["missed"] = 1.0
    self._workdir.row(
      *(label, ratio, self._start.seed),
      top1=top1,
      drop_float=float_top1 - top1,
      relative=100 * top1 / float_top1 if float_top1 else None,
      images=len(right),
      table=table.name,
      **columns,
    )

  def _runnable(
    self, model: Runnable, label: str, budget: float
  ) -> tuple[np.ndarray, dict[str, float]]:
    right = self._evaluator.correct(f"{label} at {budget:g}", model.predict)
    return right, {"avg_bits": model.avg_bits, **model.sizes}

  def _plans(
    self, method: Method, plans, label: str, budget: float
  ) -> tuple[np.ndarray, dict[str, float]]:
    """The mean over plans."""
    table, start = self._table, self._start
    right = np.mean([self._correct(plan, label, budget) for plan in plans], axis=0)
    if not method.reference:
      self._keep(method.name, budget, plans[0])
    layers = self._evaluator.network.layers
    took = [sizes(layers, plan.bits, table.activation_bits, table.kept) for plan in plans]
    return right, {
      "avg_bits": float(np.mean([start.average(plan.bits) for plan in plans])),
      **{name: float(np.mean([one[name] for one in took])) for name in took[0]},
    }

  def _correct(self, plan: Plan, label: str, budget: float) -> np.ndarray:
    key = tuple(plan.bits[layer.name] for layer in self._start.layers)
    if key not in self._right:
      model = self._evaluator.layerwise(self._table, self._start)
      bits = {name: plan.bits.get(name, self._table.kept) for name in model.stacks.names}
      self._right[key] = self._evaluator.correct(
        f"{label} at {budget:g}", lambda x: model.exact(bits, x)
      )
    return self._right[key]

  def _keep(self, method: str, budget: float, plan: Plan) -> None:
    """Adds a plan to the table's `plans.json`: method -> budget -> layer -> bits."""
    path = self._start.folder / "plans.json"
    plans = files.read_json(path) if path.is_file() else {}
    plans.setdefault(method, {})[f"{budget:g}"] = plan.bits
    files.write_text(path, json.dumps(plans, indent=2) + "\n")
