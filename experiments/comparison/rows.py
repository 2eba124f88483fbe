"""The rows of a comparison: one method at one budget, planned, evaluated and written."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.comparison import sections
from experiments.comparison.bit_plans import Planned, Planner
from experiments.comparison.measured import Measured
from experiments.comparison.sections import Section
from experiments.shared import setup
from experiments.shared.checks import field
from experiments.shared.stages import Stages
from flexiq_jax import evaluation, models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.methods import layerwise
from flexiq_jax.network import Network
from flexiq_jax.runs import files
from flexiq_jax.runs.workdir import Workdir


class Model:
  """The model that is compared on; what is compiled is compiled once for all seeds.

  Attributes:
    config, inputs: of the run.
    apply, params: the float model, batch norm unfolded.
    network: the same, folded.
  """

  def __init__(self, config, inputs: setup.Inputs):
    """Builds it with the config's weights."""
    self.config, self.inputs = config, inputs
    module, params = inputs.module, inputs.params
    self.apply, _ = models.functional(module)
    if params is None:
      self.apply, params = models.functional(setup.build(config, inputs.settings))
    self.params = params
    x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
    self.network = Network(self.apply, self.params, x)
    self._models: dict[Any, layerwise.Layerwise] = {}

  def layerwise(self, section: Section, measured: Measured) -> layerwise.Layerwise:
    """The model at any bits per layer, with this seed's scales; compiled once for all seeds."""
    key = (section.activation_bits, section.per_channel)
    alike = [s for s in sections.of(self.config) if (s.activation_bits, s.per_channel) == key]
    bits = {b for s in alike for b in s.widths}
    if "uniform" in section.methods:
      bits |= {round(budget) for budget in section.budgets}
    stacks = measured.stacks(section, tuple(sorted(bits)))
    known = self._models.get((key, stacks.bits))
    if known is None:
      known = layerwise.Layerwise(
        self.network.apply, self.network.params, stacks, self.network.platform
      )
      self._models[key, stacks.bits] = known
    known.stacks = stacks
    return known

  def evaluate(self, label: str, predict) -> np.ndarray:
    """Which evaluation images are classified rightly, bool `[n]`."""
    with setup.shown_batches(self.config, self.inputs, label) as batches:
      return evaluation.correct(predict, batches)

  def sizes(self, bits, activation_bits: int | None, kept: int) -> dict[str, float]:
    """Columns bitops and size of bits per layer."""
    operations = size = 0.0
    for layer in self.network.layers:
      w = bits.get(layer.name, kept)
      a = w if activation_bits is None or layer.name not in bits else activation_bits
      operations += layer.macs * w * a
      size += layer.params * w / 8
    return {"bitops": operations / 1e9, "size": size / 2**20}


class Table:
  """Adds rows to one section of one seed."""

  def __init__(
    self, model: Model, workdir: Workdir, stages: Stages, measured: Measured, planner: Planner
  ):
    """Keeps what rows need.

    Args:
      model: what is evaluated.
      workdir: of the run.
      stages: of the seed, for FlexiQ's orders.
      measured: what the seed drew and calibrated.
      planner: of the section and seed.
    """
    self._model, self._workdir, self._stages = model, workdir, stages
    self._measured, self._planner = measured, planner
    self._section, self._seed = planner.section, measured.seed
    self._layerwise: layerwise.Layerwise | None = None
    self._flexiq: dict[str, AdaptiveModel] = {}
    self._right: dict[tuple[int, ...], np.ndarray] = {}  # equal plans are evaluated once

  def row(self, method: str, budget: float) -> None:
    """Plans, evaluates and writes one row."""
    with field(f"config.comparison, {self._section.label(method)} at {budget:g}"):
      right, columns = (
        self._of_flexiq(method, budget)
        if method.startswith("flexiq")
        else self._of_plans(method, budget)
      )
    label, ratio = self._section.label(method), self._section.ratio(budget)
    folder = self._planner.folder / "correct"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{method}_{ratio:.6f}.npy", right)
    top1 = 100 * float(right.mean())
    float_top1 = next(r["top1"] for r in self._workdir.rows() if r["method"] == "float")
    if self._section.missed(budget, columns["avg_bits"]):
      columns["missed"] = 1.0
    self._workdir.row(
      *(label, ratio, self._seed),
      top1=top1,
      drop_float=float_top1 - top1,
      relative=100 * top1 / float_top1 if float_top1 else None,
      images=len(right),
      section=self._section.name,
      **columns,
    )

  def _of_plans(self, method: str, budget: float) -> tuple[np.ndarray, dict[str, float]]:
    if method == "random":
      draws = range(self._model.config.comparison.random_plans)
      plans = [self._planner.random(budget, draw) for draw in draws]
    else:
      plans = [self._planner.plan(method, budget)]
    right = np.mean([self._predicted(method, budget, plan) for plan in plans], axis=0)
    if method not in ("random", "uniform"):
      self._keep(method, budget, plans[0])
    sizes = [
      self._model.sizes(plan.bits, self._section.activation_bits, self._section.kept)
      for plan in plans
    ]
    cost = self._planner.cost_of(method)
    columns = {
      "avg_bits": float(np.mean([self._planner.average(plan.bits) for plan in plans])),
      **{name: float(np.mean([size[name] for size in sizes])) for name in sizes[0]},
      "seconds": cost["seconds"] + plans[0].seconds,
      "forwards": cost["forwards"],
      **plans[0].columns,
    }
    return right, columns

  def _predicted(self, method: str, budget: float, plan: Planned) -> np.ndarray:
    key = tuple(plan.bits[name] for name in self._planner.names)
    if key not in self._right:
      if self._layerwise is None:
        self._layerwise = self._model.layerwise(self._section, self._measured)
      model, kept = self._layerwise, self._section.kept
      bits = {name: plan.bits.get(name, kept) for name in model.stacks.names}
      label = f"seed {self._seed}, {self._section.label(method)} at {budget:g}"
      self._right[key] = self._model.evaluate(label, lambda x: model.exact(bits, x))
    return self._right[key]

  def _keep(self, method: str, budget: float, plan: Planned) -> None:
    """Adds a plan to the section's `plans.json`: method -> budget -> layer -> bits."""
    path = self._planner.folder / "plans.json"
    plans = files.read_json(path) if path.is_file() else {}
    plans.setdefault(method, {})[f"{budget:g}"] = plan.bits
    files.write_text(path, json.dumps(plans, indent=2) + "\n")

  def _of_flexiq(self, method: str, budget: float) -> tuple[np.ndarray, dict[str, float]]:
    ratio = self._section.ratio(budget)
    model = self._order(method)
    label = f"seed {self._seed}, {method} at {budget:g}"
    right = self._model.evaluate(label, lambda x: model(x, ratio))
    share = model.schedule.mac_share(ratio)
    network = self._model.network
    low = sum(network.layer(name).macs for name in self._planner.names) * share
    sizes = self._model.sizes({}, None, 8)
    sizes["bitops"] -= low * (8 * 8 - 4 * 4) / 1e9
    return right, {"avg_bits": 8 - 4 * share, **sizes, **self._planner.cost_of(method)}

  def _order(self, method: str) -> AdaptiveModel:
    """FlexiQ's model in the order of a method; searched once and then read back."""
    if method not in self._flexiq:
      settings = self._model.inputs.settings
      workdir = self._stages.workdir
      search = settings.search
      if method == "flexiq_greedy":
        search = dataclasses.replace(search, method="greedy")
      path = Path("recipes") / f"{search.method}.json"
      begin, done = time.monotonic(), len(workdir.events("selected"))
      self._flexiq[method] = self._stages.select(path, settings.groups, search)
      if selected := workdir.events("selected")[done:]:  # not read back
        workdir.event(
          "measured",
          section=self._section.name,
          method=method,
          seconds=time.monotonic() - begin,
          # The pass that scores every group alone comes before any search.
          forwards=1.0 + selected[-1].get("forwards", 0.0),
        )
    return self._flexiq[method]
