"""Ways to spend bits beside each other: FlexiQ and the layer-wise methods at equal budgets.

The paper's Table 5 in its post-training part. All methods share the float model, the calibration
images and the quantizer (per-channel weights, ranges by the config); experiments/sections.py says
which tables there are.

| method | what it is |
|---|---|
| `float`, `uniform` | no quantization; every layer at the same bits |
| `random` | random layers at more bits while the budget lasts; mean of several plans |
| `clado` | CLADO: pairs of layers by their measured losses, projected, solved |
| `clado_block`, `clado_diagonal` | the same with interactions inside of blocks only; with none |
| `mpqco` | MPQCO's gradient metric |
| `hawq` | HAWQ-v3's traces of the Hessian; layers that meet in an addition are tied |
| `quantune` | QuantuneV2: two runs, the best form of the graph |
| `flexiq_greedy`, `flexiq` | FlexiQ's channel groups, greedily and by the config's own search |

Columns beside the usual ones: `relative` (top-1 in % of float), `bitops` (G per image, MACs times
bits of both operands), `size` (MB of 2^20 bytes; FlexiQ stores 8-bit codes whatever it runs at),
`seconds` and `forwards` of the selection (passes over the calibration images; calibration, which
all share, not counted), `gap` (of the solver), `missed` (1 where the average bits are more than
0.05 away from the budget: single layers are larger than that, or more bits promise nothing).
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import compare_report, reporting, sections, setup
from experiments import flexiq as base_experiment
from experiments.bit_plans import Measured, Planned, Planner
from experiments.checks import field
from experiments.sections import TOLERANCE, Section
from experiments.stages import Stages
from flexiq_jax import data, distributed, evaluation, files, flexiq, models, report, runtime
from flexiq_jax.methods import layerwise
from flexiq_jax.metrics import Writer


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  sections.of(config)
  return base_experiment.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  sections.of(config)
  _check(config)
  return base_experiment.prepare(config)


def run(config, inputs: setup.Inputs, workdir: Path, writer: Writer, command: str) -> Path:
  """Runs the comparison; arguments and result as `experiments.flexiq.run`."""
  started = time.monotonic()
  writer.event("start", command=command, **runtime.describe())
  comparison = _Comparison(config, inputs, workdir, writer)
  comparison.float()
  for seed in config.comparison.seeds:
    for section in sections.of(config):
      comparison.section(section, seed)
  writer.event("done", peak_memory=runtime.peak_memory())
  seconds = time.monotonic() - started
  path = compare_report.write(config, inputs, workdir, writer, command, seconds)
  report.print_results(writer.rows(), title=f"comparison, {reporting.title(config)}")
  writer.finish()
  return path


class _Comparison:
  """One model, all seeds; what is compiled is compiled once."""

  def __init__(self, config, inputs: setup.Inputs, workdir: Path, writer: Writer):
    self._config, self._inputs, self._workdir, self._writer = config, inputs, workdir, writer
    module, params = inputs.module, inputs.params
    self._apply, _ = models.functional(module)
    if params is None:
      self._apply, params = models.functional(setup.build(config, inputs.settings))
    self._params = params
    x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
    self._network = flexiq.Network(self._apply, params, x)
    self._models: dict[Any, layerwise.Layerwise] = {}
    self._started: dict[int, _Seed] = {}

  def float(self) -> None:
    """The row of the float model."""
    if self._writer.has("float", None, None):
      return
    right = self._evaluate("float", self._network.float)
    self._writer.row(
      *("float", None, None),
      **{"top1": 100 * right.mean(), "drop_float": 0.0, "relative": 100.0, "avg_bits": 32.0},
      images=len(right),
      **self._sizes({}, layerwise.FLOAT, layerwise.FLOAT),
    )

  def section(self, section: Section, seed: int) -> None:
    """All rows of one table and seed."""
    missing = {
      (method, budget)
      for method in section.methods
      for budget in section.budgets
      if not self._writer.has(section.label(method), section.ratio(budget), seed)
    }
    if not missing:
      return
    if seed not in self._started:
      self._started[seed] = _Seed(self._config, self._inputs, self._workdir, self._network, seed)
    started = self._started[seed]
    measured = Measured(
      network=self._network,
      apply=self._apply,
      params=self._params,
      observations=started.observations,
      ranges=self._inputs.settings.ranges,
      selectable=self._inputs.selectable,
      images=started.images,
      labels=started.labels,
      seed=seed,
    )
    folder = started.folder / section.name
    planner = Planner(self._config.comparison, measured, section, folder, started.writer)
    table = _Table(self, section, started, measured, planner)
    for method in section.methods:
      for budget in section.budgets:
        if (method, budget) in missing:
          table.row(method, budget)
    if "quantune" in section.methods and any(method == "quantune" for method, _ in missing):
      lists = compare_report.quantune_lists(planner, section.budgets)
      files.write_text(folder / "quantune.json", json.dumps(lists, indent=2) + "\n")

  def layerwise(self, section: Section, measured: Measured) -> layerwise.Layerwise:
    """The model at any bits per layer, with this seed's scales; compiled once for all seeds."""
    key = (section.activation_bits, section.per_channel)
    alike = [s for s in sections.of(self._config) if (s.activation_bits, s.per_channel) == key]
    bits = {b for s in alike for b in s.bits}
    if not section.by_size and "uniform" in section.methods:
      bits |= {round(budget) for budget in section.budgets}
    stacks = measured.stacks(section, tuple(sorted(bits)))
    known = self._models.get((key, stacks.bits))
    if known is None:
      network = self._network
      known = layerwise.Layerwise(network.apply, network.params, stacks)
      self._models[key, stacks.bits] = known
    known.stacks = stacks
    return known

  def _evaluate(self, label: str, predict) -> np.ndarray:
    """Which evaluation images are classified rightly, bool `[n]`."""
    batches, count = setup.evaluation_batches(self._config, self._inputs)
    with runtime.Progress(f"{label}, images", count) as progress:

      def counted():
        with field("config.data", self._config.data):  # of reading, not of the model
          for batch in batches:
            yield batch
            progress.update(int(batch.mask.sum()))

      return evaluation.correct(predict, counted())

  def _sizes(self, bits, activation_bits: int | None, kept: int) -> dict[str, float]:
    """Columns bitops and size of bits per layer."""
    operations = size = 0.0
    for layer in self._network.layers:
      w = bits.get(layer.name, kept)
      a = w if activation_bits is None or layer.name not in bits else activation_bits
      operations += layer.macs * w * a
      size += layer.params * w / 8
    return {"bitops": operations / 1e9, "size": size / 2**20}


class _Seed:
  """What a seed draws and calibrates once for all sections."""

  def __init__(self, config, inputs: setup.Inputs, workdir: Path, network, seed: int):
    self.config = config.copy_and_resolve_references()
    self.config.seed = seed
    self.seed, self.folder = seed, workdir / f"seed{seed}"
    self.folder.mkdir(exist_ok=True)
    self.writer = Writer(self.folder)
    self.stages = Stages(config=self.config, inputs=inputs, workdir=self.folder, writer=self.writer)
    self.batches = setup.calibration_batches(self.config, inputs)
    self.images = np.concatenate(self.batches)
    self.labels = _labels(self.config, inputs)
    self.observations = self.stages.observe(network, self.batches)


class _Table:
  """Adds rows to one section of one seed."""

  def __init__(self, whole: _Comparison, section, started: _Seed, measured, planner: Planner):
    self._whole, self._section, self._seed = whole, section, started
    self._measured, self._planner = measured, planner
    self._model: layerwise.Layerwise | None = None
    self._flexiq: dict[str, flexiq.FlexiQ] = {}
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
    writer, top1 = self._whole._writer, 100 * float(right.mean())
    float_top1 = next(r["top1"] for r in writer.rows() if r["method"] == "float")
    if not self._section.by_size and abs(columns["avg_bits"] - budget) > TOLERANCE:
      columns["missed"] = 1.0
    writer.row(
      *(label, ratio, self._seed.seed),
      top1=top1,
      drop_float=float_top1 - top1,
      relative=100 * top1 / float_top1 if float_top1 else None,
      images=len(right),
      section=self._section.name,
      **columns,
    )

  def _of_plans(self, method: str, budget: float) -> tuple[np.ndarray, dict[str, float]]:
    if method == "random":
      draws = range(self._whole._config.comparison.random_plans)
      plans = [self._planner.random(budget, draw) for draw in draws]
    else:
      plans = [self._planner.plan(method, budget)]
    right = np.mean([self._predicted(method, budget, plan) for plan in plans], axis=0)
    if method not in ("random", "uniform"):
      self._keep(method, budget, plans[0])
    sizes = [
      self._whole._sizes(plan.bits, self._section.activation_bits, self._section.kept)
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
      if self._model is None:
        self._model = self._whole.layerwise(self._section, self._measured)
      model, kept = self._model, self._section.kept
      bits = {name: plan.bits.get(name, kept) for name in model.stacks.names}
      label = f"seed {self._seed.seed}, {self._section.label(method)} at {budget:g}"
      self._right[key] = self._whole._evaluate(label, lambda x: model.exact(bits, x))
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
    label = f"seed {self._seed.seed}, {method} at {budget:g}"
    right = self._whole._evaluate(label, lambda x: model(x, ratio))
    share = model.schedule.mac_share(ratio)
    network = self._whole._network
    low = sum(network.layer(name).macs for name in self._planner.names) * share
    sizes = self._whole._sizes({}, None, 8)
    sizes["bitops"] -= low * (8 * 8 - 4 * 4) / 1e9
    return right, {"avg_bits": 8 - 4 * share, **sizes, **self._planner.cost_of(method)}

  def _order(self, method: str) -> flexiq.FlexiQ:
    """FlexiQ's model in the order of a method; searched once and then read back."""
    if method not in self._flexiq:
      network, seed = self._whole._network, self._seed
      settings = self._whole._inputs.settings
      search = settings.search
      if method == "flexiq_greedy":
        search = dataclasses.replace(search, method="greedy")
      path = seed.folder / "recipes" / f"{search.method}.json"
      base = flexiq.base_model(network, seed.observations, settings.ranges)
      begin, done = time.monotonic(), len(seed.writer.events("selected"))
      self._flexiq[method] = seed.stages.select(
        path, settings.groups, network, base, seed.observations, seed.batches, search
      )
      if selected := seed.writer.events("selected")[done:]:  # not read back
        seed.writer.event(
          "measured",
          section=self._section.name,
          method=method,
          seconds=time.monotonic() - begin,
          # The pass that scores every group alone comes before any search.
          forwards=1.0 + selected[-1].get("forwards", 0.0),
        )
    return self._flexiq[method]


def _labels(config, inputs: setup.Inputs) -> np.ndarray:
  """Labels of the calibration images, int32 `[n]`, in the order of their batches."""
  part = config.calibration
  indices = data.calibration_indices(inputs.calibration, part.images, config.seed)
  with field("config.calibration", part):
    batches = data.batches(
      inputs.calibration, inputs.settings.preprocess, part.batch_size, indices=indices
    )
    return np.concatenate([batch.labels[batch.mask] for batch in batches]).astype(np.int32)


def _check(config) -> None:
  part = config.comparison
  if distributed.several():
    raise ValueError("config.experiment: 'compare' runs in one process; start it without srun")
  if config.weights == "train" or config.recipe:
    raise ValueError("config.weights, config.recipe: a comparison takes pretrained weights")
  for name in ("random_plans", "block"):
    if isinstance(part[name], bool) or not isinstance(part[name], int) or part[name] < 1:
      raise ValueError(f"config.comparison.{name}: {part[name]!r} is not a positive integer")
  if isinstance(part.probes, bool) or not isinstance(part.probes, int) or part.probes < 2:
    raise ValueError(f"config.comparison.probes: {part.probes!r}; at least 2 are accepted")
  if not part.time_limit > 0:
    raise ValueError(f"config.comparison.time_limit: {part.time_limit!r}; seconds above 0")
  if part.loss not in ("cross_entropy", "kl"):
    raise ValueError(f"config.comparison.loss: {part.loss!r} is not one of cross_entropy, kl")
