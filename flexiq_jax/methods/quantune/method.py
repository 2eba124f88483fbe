"""QuantuneV2 as a method: two runs, the best form of the graph for each budget."""

import dataclasses
import functools
import json
import time
from typing import Any

from flexiq_jax import graph
from flexiq_jax.methods import fusion
from flexiq_jax.methods.base import Details, Method, Plan, Shown
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.programmed import check_positive
from flexiq_jax.methods.quantune import forms
from flexiq_jax.methods.quantune.forms import Allocation
from flexiq_jax.methods.quantune.runs import Runs, measure
from flexiq_jax.methods.task import Task
from flexiq_jax.quant import calibration, rules
from flexiq_jax.runs import files, tables

EXAMPLES = 128
_FORMS = ("form", "budget", "nodes", "boundaries", "predicted error", "with penalty", "chosen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantuneSettings:
  """What QuantuneV2 is told.

  Attributes:
    block: examples in one forward pass.
  """

  block: int = 64

  def __post_init__(self):
    check_positive("block", self.block)


class Quantune(Method):
  """Two runs; the best form of the graph. What it knows goes to `quantune.json`."""

  name = "quantune"
  Settings = QuantuneSettings

  @classmethod
  def fits(cls, task: Task) -> bool:
    """Two precisions, one for each end of its list; MACs are what it counts."""
    return len(task.bits) == 2 and task.unit != "size"

  @property
  def pair(self) -> tuple[int, int]:
    """Low and high bits."""
    return min(self.start.task.bits), max(self.start.task.bits)

  def at(self, budget: float) -> list[Plan]:
    """The plan of the best form; column `boundaries`."""
    begin = time.monotonic()
    plans = self.forms(budget)
    columns = {"boundaries": float(plans[0].boundaries)}
    seconds = time.monotonic() - begin
    self._keep(budget, plans)
    return [Plan(bits=plans[0].bits, seconds=seconds, columns=columns)]

  def forms(self, budget: float) -> tuple[Allocation, ...]:
    """Plans in all forms of the graph, the best first."""
    start, (low, high) = self.start, self.pair
    extra = {layer.name: layer.macs * (high - low) for layer in start.layers}
    total = sum(layer.macs for layer in start.layers)
    most = (start.task.limit(budget) - low) * total * (1 + 1e-9)
    names = start.choices.names
    return forms.choose(self.runs, names, self.pair, extra, most, kept=start.task.kept, fill=True)

  @functools.cached_property
  def runs(self) -> Runs:
    """The two runs."""
    start = self.start
    layers, x, block = start.network.layers, start.x[:EXAMPLES], self.settings.block
    low = calibration.quantize(
      layers,
      # Norms unfolded. A scale per output channel passes through a norm, and so do the codes.
      graph.weights(start.apply, start.params, x[:1]),
      start.calibrated.observations.values,
      start.calibrated.ranges,
      self.pair[0],
      [layer.name for layer in layers if layer.name not in start.names],
    )
    batches = [x[i : i + block] for i in range(0, len(x), block)]
    return self.measure(
      2.0 * len(x) / len(start.x),
      lambda: measure(start.apply, start.params, self._quantized(low), batches),
    )

  def _quantized(self, model: rules.QModel) -> rules.Rule:
    """All layers quantized; without those that are in floating point in every plan."""
    uniform = rules.uniform_rule(model, self.start.network.platform)
    floats = set(model).difference(self.start.names) if self.start.task.kept == FLOAT else ()

    def rule(layer, x, w, contract):
      if layer.name in floats:
        return contract(x, w)
      return uniform(layer, x, w, contract)

    return rule

  def _keep(self, budget: float, found: tuple[Allocation, ...]) -> None:
    """Adds the plans of a budget to the file; it begins with the sensitivity lists."""
    path = self.start.folder / "quantune.json"
    before = files.read_json(path)["plans"] if path.is_file() else []
    own = [
      {
        "budget": budget,
        "grouping": plan.grouping,
        "chosen": rank == 0,
        "nodes": len(plan.node_bits),
        "boundaries": plan.boundaries,
        "error": plan.error,
        "value": plan.value,
        "node_bits": plan.node_bits,
      }
      for rank, plan in enumerate(found)
    ]
    others = [plan for plan in before if plan["budget"] != budget]
    plans = sorted(others + own, key=lambda plan: plan["budget"])
    kept = files.to_plain({"pair": self.pair, "lists": self._lists, "plans": plans})
    files.write_text(path, json.dumps(kept, indent=2) + "\n")

  @functools.cached_property
  def _lists(self) -> dict[str, Any]:
    """The sensitivity list of each form of the graph, whatever the budget."""
    runs, lists = self.runs, {}
    for grouping in fusion.GROUPINGS:
      listed = forms.ranked(runs, grouping, self.start.choices.names)
      lists[grouping] = [
        {
          "node": node.name,
          "operations": [runs.operations[i].kind for i in node.operations],
          "sqnr": listed.sqnr[v],
          "delta": listed.delta[v],
          "nmse": listed.nmse[v],
          "score": listed.score.get(node.layer or ""),
        }
        for v, node in enumerate(listed.nodes)
      ]
    return lists

  @classmethod
  def report(cls, shown: Shown) -> Details:
    """The list and the forms of the graph at each budget, of the first run."""
    path = shown.workdirs[0].path / shown.table / "quantune.json"
    if not path.is_file():
      return Details()
    found = files.read_json(path)
    plans, (low, high) = found["plans"], found["pair"]
    form = max(fusion.GROUPINGS, key=[p["grouping"] for p in plans if p["chosen"]].count)
    text = "\n\n".join(
      [
        f"The sensitivity list of the first seed in the form `{form}`, {low} and {high} "
        f"bits{' (floating point)' if high == FLOAT else ''}:",
        _nodes(found["lists"][form], [p for p in plans if p["grouping"] == form], shown),
        "The forms of the graph, the best first at each budget:",
        _plans(plans, shown),
      ]
    )
    return Details(parts=(("QuantuneV2", text),))


def _nodes(nodes: list[dict[str, Any]], plans: list[dict[str, Any]], shown: Shown) -> str:
  header = ["node", "operations", "SQNR (dB)", "delta (dB)", "NMSE", "score"]
  header += [f"bits at {shown.budget(p['budget'])}" for p in plans]
  cells = [
    [
      node["node"],
      " + ".join(node["operations"]),
      *(tables.number(node[n], 4 if n == "nmse" else 1) for n in ("sqnr", "delta", "nmse")),
      tables.number(node["score"], 2),
      *(str(p["node_bits"][v]) for p in plans),
    ]
    for v, node in enumerate(nodes)
  ]
  return tables.markdown_table(header, cells, left=2)


def _plans(plans: list[dict[str, Any]], shown: Shown) -> str:
  cells = [
    [
      p["grouping"],
      shown.budget(p["budget"]),
      str(p["nodes"]),
      str(p["boundaries"]),
      tables.number(p["error"], 4),
      tables.number(p["value"], 4),
      "yes" if p["chosen"] else "",
    ]
    for p in plans
  ]
  return tables.markdown_table(_FORMS, cells)
