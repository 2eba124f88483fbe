"""Ways to spend bits beside each other: FlexiQ and the layer-wise methods at equal budgets.

The paper's Table 5 for one seed, `config.seed`. All methods share the
float model, the calibration images and the quantizer (per-channel weights, ranges by the config);
experiments/comparison/tables.py says which tables there are. `config.comparison.methods` names the
methods, by a name in `flexiq_jax.methods.METHODS` or as `package.module:Class`.

Columns beside the usual ones: `relative` (top-1 in % of float), `bitops` (G per image, MACs times
bits of both operands), `size` (MB of 2^20 bytes; FlexiQ stores 8-bit codes whatever it runs at),
`seconds` and `forwards` of selection or training (passes over the calibration images; calibration,
which all share, not counted), `steps` of training, `gap` (of the solver), `missed` (1 where the
average bits are more than 0.05 away from the budget, or the share in 8 bits more than 5 points:
single layers are larger than that, or more bits promise nothing).
"""

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np

from experiments import curve
from experiments.comparison.report import collect
from experiments.comparison.rows import Evaluator, TableRows
from experiments.comparison.tables import Table, settings_of, tables_of
from experiments.shared import setup
from experiments.shared.checks import field, require
from experiments.shared.stages import Stages
from flexiq_jax import data
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.methods import Examples, Start
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.task import sizes
from flexiq_jax.quant import check_one_of
from flexiq_jax.runs import distributed, process
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.training import AUGMENTATIONS, augment

__all__ = ["collect", "describe", "prepare", "run"]


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  _check(config)
  return curve.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  _check(config)
  return curve.prepare(config)


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Runs the comparison of one seed; arguments and result as `experiments.curve.run`."""
  started = time.monotonic()
  workdir.event("start", command=command, **process.describe())
  one = _Run(inputs, workdir)
  one.float_row()
  for table in one.tables:
    one.add(table)
  workdir.event("done", peak_memory=process.peak_memory())
  path = collect(inputs, [workdir], workdir, command, time.monotonic() - started)
  workdir.finish()
  return path


class _Run:
  """All rows of a run; it calibrates when the first one is missing."""

  def __init__(self, inputs: setup.Inputs, workdir: Workdir):
    self._config, self._inputs, self._workdir = inputs.config, inputs, workdir
    self.tables = tables_of(inputs.config)
    self._stages = Stages(inputs, workdir)
    self._evaluator = Evaluator(inputs, self._stages.network, self.tables)
    self._orders: dict[bool, AdaptiveModel] = {}

  def float_row(self) -> None:
    """The row of the float model."""
    if self._workdir.has("float", None, None):
      return
    right = self._evaluator.correct("float", self._stages.network.float)
    self._workdir.row(
      *("float", None, None),
      **{"top1": 100 * right.mean(), "drop_float": 0.0, "relative": 100.0, "avg_bits": 32.0},
      images=len(right),
      **sizes(self._stages.network.layers, {}, FLOAT, FLOAT),
    )

  def add(self, table: Table) -> None:
    """All rows of one table that are not there yet."""
    missing = [
      (name, budget)
      for name in table.methods
      for budget in table.budgets
      if not self._workdir.has(table.label(name), table.ratio(budget), self._config.seed)
    ]
    if not missing:
      return
    start = self._start(table)
    rows = TableRows(table, start, self._evaluator)
    asked = {
      name: table.methods[name](start, settings_of(self._config.comparison, table.methods[name]))
      for name in dict(missing)
    }
    for name, budget in missing:
      rows.add(asked[name], budget)

  def _start(self, table: Table) -> Start:
    folder = self._workdir.path / table.name
    folder.mkdir(exist_ok=True)
    apply, params = self._stages.unfolded
    _, labels = self._inputs.calibration_set
    used = self._config.comparison.images or len(self._x)
    return Start(
      task=table,
      table=table.name,
      calibrated=self._stages.calibrated,
      apply=apply,
      params=params,
      names=self._inputs.selectable,
      x=self._x,
      examples=Examples(self._x[:used], labels[:used]),
      seed=self._config.seed,
      workdir=self._workdir,
      folder=folder,
      order=self._order,
      training=self._training,
      prepare=self._prepare,
    )

  @functools.cached_property
  def _x(self) -> np.ndarray:
    return np.concatenate([*self._stages.calibrated.batches])

  def _training(self, batch_size: int) -> data.Epochs:
    """All training images, shuffled by seed and epoch."""
    source, preprocess = self._inputs.calibration, self._inputs.settings.preprocess
    everything, seed = np.arange(len(source)), self._config.seed
    return data.Epochs(source, preprocess, batch_size, indices=everything, seed=seed)

  def _prepare(self, key, images):
    """Augmented and normalised."""
    images = augment(key, images, self._config.comparison.augmentation)
    return self._inputs.settings.preprocess.normalize(images)

  def _order(self, greedy: bool) -> tuple[AdaptiveModel, float | None]:
    """FlexiQ's model, kept as a recipe, and the forward passes of a search that was made."""
    settings, forwards = self._inputs.settings, None
    if greedy not in self._orders:
      search = settings.search
      if greedy:
        search = dataclasses.replace(search, method="greedy")
      path, done = Path("recipes") / f"{search.method}.json", len(self._selected())
      self._orders[greedy] = self._stages.select(path, settings.groups, search)
      if selected := self._selected()[done:]:  # not read back
        forwards = selected[-1].get("forwards", 0.0)
    return self._orders[greedy], forwards

  def _selected(self) -> list[dict]:
    return self._workdir.events("selected")


def _check(config) -> None:
  require(config, "comparison", "configs/compare_cifar10.py:of=NAME")
  part = config.comparison
  if distributed.several():
    raise ValueError("config.experiment: 'compare' runs in one process; start it without srun")
  if config.weights == "train" or config.recipe:
    raise ValueError("config.weights, config.recipe: a comparison takes pretrained weights")
  most = config.calibration.images
  if isinstance(part.images, bool) or part.images not in range(most + 1):
    raise ValueError(
      f"config.comparison.images: {part.images!r}; 0 (all) to config.calibration.images, "
      f"{most}, are accepted"
    )
  with field("config.comparison", part):
    check_one_of("augmentation", part.augmentation, AUGMENTATIONS)
  for table in tables_of(config):
    for method in table.methods.values():
      settings_of(part, method)
