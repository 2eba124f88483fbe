"""The stages of a FlexiQ run that cost time and are kept in the workdir: train, calibrate, select.

A stage that is complete is read back instead of computed again. What it depends on is stored beside
it, so that a workdir that goes on with another config (`--overrule`) never mixes the two: a stage
made under other values is made anew.

| stage     | kept as                            | depends on                                 |
|-----------|------------------------------------|--------------------------------------------|
| train     | `train/`, a checkpoint per epoch   | data, settings of the training             |
| calibrate | `calibration/`, one checkpoint     | model, weights, calibration images, ranges |
| select    | `recipe.json`, `recipes/NAME.json` | the same, grouping, score, layers, search  |

Of several processes the main one reads, writes and calibrates, and tells the others; all search.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import setup
from experiments.shared.checks import field
from flexiq_jax import data, models, orders, search
from flexiq_jax.adaptive import AdaptiveModel, from_recipe, load
from flexiq_jax.calibrated import Calibrated, Grouped, Observations, calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import recipes
from flexiq_jax.quant import BINS, LowSettings, Values
from flexiq_jax.runs import checkpoint, distributed
from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.runs.files import to_plain
from flexiq_jax.runs.progress import PassProgress, Progress
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import SearchSettings
from flexiq_jax.training import classification


@dataclasses.dataclass(frozen=True)
class Stages:
  """The stages of one run.

  Attributes:
    inputs: what `setup.prepare` made of the config.
    workdir: of the run.
  """

  inputs: setup.Inputs
  workdir: Workdir

  @property
  def config(self) -> Any:
    """The config."""
    return self.inputs.config

  @functools.cached_property
  def network(self) -> Network:
    """The float model; where the config says so it is trained, which is a stage."""
    shape = self.inputs.module.input_shape
    return Network(*self.unfolded, jax.ShapeDtypeStruct((1, *shape), jnp.float32))

  @functools.cached_property
  def unfolded(self) -> tuple[models.Apply, Any]:
    """The float model as `(apply, params)`, batch norm unfolded."""
    if self.inputs.params is not None:
      apply, _ = models.functional(self.inputs.module)
      return apply, self.inputs.params
    module = self.inputs.build()
    if self.config.weights == "train":
      self._train(module)
    return models.functional(module)

  def given(self) -> AdaptiveModel:
    """The model of the recipe that the config names, with finetuned weights where it has some.

    Raises:
      ValueError: the recipe does not fit the model or its weights.
    """
    config = self.config
    with field("config", ("recipe",)):
      path = data.expand_path(config.recipe)
      return load(path, self.network, config.dynamic, other_weights=config.other_weights)

  @functools.cached_property
  def calibrated(self) -> Calibrated:
    """The network with its calibration statistics."""
    network = self.network
    template = {
      layer.name: {
        "counts": np.zeros(BINS, np.int64),
        "edges": np.zeros(BINS + 1, np.float64),
        "codes": np.zeros((layer.in_channels, 256), np.int64),
      }
      for layer in network.layers
    }
    batches, _ = self.inputs.calibration_set
    tree = self._statistics(network, batches, template) if distributed.is_main() else None
    if distributed.several():
      data = distributed.broadcast_bytes(checkpoint.pack(tree) if tree else None)
      assert data is not None
      tree, _ = checkpoint.unpack(template, data)
    assert tree is not None
    observations = Observations(
      values={n: Values(np.asarray(t["counts"]), np.asarray(t["edges"])) for n, t in tree.items()},
      codes={name: np.asarray(t["codes"]) for name, t in tree.items()},
    )
    return Calibrated(network, batches, observations, self.inputs.settings.ranges)

  def _train(self, module):
    """Trains a module from scratch, from the last checkpoint on.

    Args:
      module: an `nnx.Module` with initial weights; it is trained in place.
    """
    done = 0
    settings = self.inputs.settings.train
    with (
      field("config.train", self.config.train),
      Progress("training, epochs", settings.epochs) as progress,
    ):

      def log(entry: classification.EpochLog) -> None:
        nonlocal done
        self.workdir.event("train", **dataclasses.asdict(entry))
        note = f"loss {entry.loss:.3f}, top-1 {entry.train_top1:.1f} %"
        if entry.held_out_top1 is not None:
          note += f", held out {entry.held_out_top1:.1f} %"
        progress.update(entry.epoch - done, note)
        done = entry.epoch

      classification.fit(
        module,
        self.inputs.calibration,
        self.inputs.settings.preprocess,
        settings=settings,
        checkpoint_dir=self.workdir.path / "train",
        progress=log,
      )

  def _statistics(self, network: Network, batches: list[np.ndarray], template) -> Any:
    """What `calibrated` keeps: layer name -> counts, edges and codes."""
    made_from = _calibrated_on(self.config)
    with Checkpoints(self.workdir.path / "calibration", keep=1) as checkpoints:
      found = checkpoints.restore_latest(template)
      if found is not None and found.metadata == made_from:
        return found.tree
      examples = sum(map(len, batches))
      with PassProgress(examples, "calibration, ") as progress:
        seen = calibrate(network, batches, self.inputs.settings.ranges, progress).observations
      tree = {
        name: {"counts": v.counts, "edges": v.edges, "codes": seen.codes[name]}
        for name, v in seen.values.items()
      }
      checkpoints.save(found.step + 1 if found else 0, tree, made_from)
      self.workdir.event("calibrated", images=examples)
      return tree

  def select(self, path: Path, settings: LowSettings, search: SearchSettings) -> AdaptiveModel:
    """Selection of an order, kept as a recipe file; what is evaluated is what the file says.

    Args:
      path: the recipe file, below the workdir.
      settings: how channels are grouped and lowered.
      search: how the order is found.
    """
    path = self.workdir.path / path
    searched = search.method != "greedy"
    made_from = to_plain(
      {
        "search": dataclasses.asdict(search) if searched else {"method": "greedy"},
        "ranges": dataclasses.asdict(self.inputs.settings.ranges),
        "groups": dataclasses.asdict(settings),
        "score": self.config.score,
        "selectable": self.inputs.selectable,
        "calibration": _calibrated_on(self.config),
      }
    )
    path.parent.mkdir(exist_ok=True)
    recipe = self._kept(path)
    if recipe is None or _with_defaults(recipe.settings) != made_from:
      grouped = self.calibrated.group(self.inputs.selectable, settings)
      order = self._order(path.stem, grouped, search, made_from)
      model = grouped.ordered(order, {*recipes.LEVELS, *(search.levels if searched else ())})
      recipe = model.recipe(
        model_name=self.config.model, method=search.method, seed=self.config.seed
      )
      recipe = dataclasses.replace(recipe, settings=made_from)
      recipes.save(path, recipe)
      # The recipe takes its place.
      shutil.rmtree(self.workdir.path / "search", ignore_errors=True)
    return from_recipe(self.network, recipe, self.config.dynamic)

  @staticmethod
  def _kept(path: Path) -> recipes.Recipe | None:
    """The recipe that the main process has at a path, None where it has none."""
    text = path.read_bytes() if path.is_file() else None
    if distributed.several():
      text = distributed.broadcast_bytes(text)
      if text is not None and not distributed.is_main():
        path.write_bytes(text)
    return None if text is None else recipes.load(path)

  def _order(self, name: str, grouped: Grouped, settings: SearchSettings, made_from) -> np.ndarray:
    """Scores the groups and searches their order."""
    batches, space = list(grouped.calibrated.batches), grouped.space
    shown = self.config.search.method if name == "recipe" else name
    with PassProgress(sum(map(len, batches)), f"selection ({shown}), ") as progress:
      scores = distributed.agree_array(grouped.scores(self.config.score == "exact", progress))
    if settings.method == "greedy":
      self.workdir.event("selected", recipe=name, method="greedy", groups=space.total)
      return orders.greedy(space, scores)
    with field("config.search", self.config.search):
      found = search.search(
        grouped.calibrated.network,
        grouped.model,
        space,
        scores,
        np.concatenate(batches),
        settings,
        seed=self.config.seed,
        workdir=self.workdir,
        made_from=made_from,
        show=lambda line: print(line, flush=True),
        mesh=search.population_mesh(),
      )
    self.workdir.event(
      "selected",
      recipe=name,
      method=settings.method,
      groups=space.total,
      fitness={f"{level:g}": value for level, value in found.fitness.items()},
      forwards=found.forwards,
      seconds=found.seconds,
    )
    return found.order


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of a recipe, which may be older than some of the fields."""
  return {**settings, "groups": {"shift_block": 0, "whole_heads": False, **settings["groups"]}}


def _calibrated_on(config) -> dict[str, Any]:
  """The fields that the calibration statistics depend on."""
  names = ("model", "model_args", "dtype", "weights", "seed", "calibration", "preprocess", "ranges")
  if config.weights == "train":
    names += ("train",)
  return {name: to_plain(config[name]) for name in names}
