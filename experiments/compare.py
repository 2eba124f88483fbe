"""Ways to spend bits beside each other: FlexiQ and the layer-wise methods at equal budgets.

The paper's Table 5 in its post-training part. All methods share the float model, the calibration
images and the quantizer (per-channel weights, ranges by the config);
experiments/comparison/sections.py says
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
0.05 away from the budget, or the share in 8 bits more than 5 points: single layers are larger than
that, or more bits promise nothing).
"""

import functools
import json
import time
from pathlib import Path

import numpy as np

from experiments import curve as base_experiment
from experiments.comparison import sections, summary
from experiments.comparison.bit_plans import Planner
from experiments.comparison.measured import Measured
from experiments.comparison.rows import Model, Table
from experiments.comparison.sections import Section
from experiments.shared import reporting, setup
from experiments.shared.checks import field
from experiments.shared.stages import Stages
from flexiq_jax import data
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.runs import distributed, files, process, report
from flexiq_jax.runs.workdir import Workdir


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  sections.of(config)
  return base_experiment.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  sections.of(config)
  _check(config)
  return base_experiment.prepare(config)


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Runs the comparison; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  model = Model(config, inputs)
  _float_row(model, workdir)
  for seed in config.comparison.seeds:
    one = _Seed(model, workdir.path / f"seed{seed}", workdir, seed)
    for section in sections.of(config):
      one.section(section)
  workdir.event("done", peak_memory=process.peak_memory())
  seconds = time.monotonic() - started
  path = summary.write(config, inputs, workdir, command, seconds)
  report.print_results(workdir.rows(), title=f"comparison, {reporting.title(config)}")
  workdir.finish()
  return path


def _float_row(model: Model, workdir: Workdir) -> None:
  """The row of the float model."""
  if workdir.has("float", None, None):
    return
  right = model.evaluate("float", model.network.float)
  workdir.row(
    *("float", None, None),
    **{"top1": 100 * right.mean(), "drop_float": 0.0, "relative": 100.0, "avg_bits": 32.0},
    images=len(right),
    **model.sizes({}, FLOAT, FLOAT),
  )


class _Seed:
  """All rows of one seed; it calibrates when the first one is missing."""

  def __init__(self, model: Model, folder: Path, workdir: Workdir, seed: int):
    self._model, self._folder, self._workdir, self._seed = model, folder, workdir, seed
    self._config = model.config.copy_and_resolve_references()
    self._config.seed = seed

  @functools.cached_property
  def _stages(self) -> Stages:
    self._folder.mkdir(exist_ok=True)
    return Stages(config=self._config, inputs=self._model.inputs, workdir=Workdir(self._folder))

  @functools.cached_property
  def _measured(self) -> Measured:
    """What this seed draws and calibrates, once for all sections."""
    model, inputs = self._model, self._model.inputs
    calibrated = self._stages.calibrated
    images = np.concatenate([*calibrated.batches])
    return Measured(
      calibrated=calibrated,
      apply=model.apply,
      params=model.params,
      selectable=inputs.selectable,
      images=images,
      labels=_labels(self._config, inputs),
      sensitivity=min(len(images), self._config.comparison.images or len(images)),
      seed=self._seed,
    )

  def section(self, section: Section) -> None:
    """All rows of one table that are not there yet."""
    missing = [
      (method, budget)
      for method in section.methods
      for budget in section.budgets
      if not self._workdir.has(section.label(method), section.ratio(budget), self._seed)
    ]
    if not missing:
      return
    measured, part, folder = self._measured, self._config.comparison, self._folder / section.name
    planner = Planner(part, measured, section, folder, self._stages.workdir)
    table = Table(self._model, self._workdir, self._stages, measured, planner)
    for method, budget in missing:
      table.row(method, budget)
    if "quantune" in dict(missing):
      lists = summary.quantune_lists(planner, section.budgets)
      files.write_text(folder / "quantune.json", json.dumps(lists, indent=2) + "\n")


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
  most = config.calibration.images
  if isinstance(part.images, bool) or part.images not in range(most + 1):
    raise ValueError(
      f"config.comparison.images: {part.images!r}; 0 (all) to config.calibration.images, "
      f"{most}, are accepted"
    )
  if isinstance(part.probes, bool) or not isinstance(part.probes, int) or part.probes < 2:
    raise ValueError(f"config.comparison.probes: {part.probes!r}; at least 2 are accepted")
  if not part.time_limit > 0:
    raise ValueError(f"config.comparison.time_limit: {part.time_limit!r}; seconds above 0")
  if part.loss not in ("cross_entropy", "kl"):
    raise ValueError(f"config.comparison.loss: {part.loss!r} is not one of cross_entropy, kl")
