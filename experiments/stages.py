"""The stages of a FlexiQ run that cost time and are kept in the workdir: train, observe, select.

A stage that is complete is read back instead of computed again. What it depends on is stored beside
it, so that a workdir that goes on with another config (`--overrule`) never mixes the two: a stage
made under other values is made anew.

| stage   | kept as                            | depends on                                 |
|---------|------------------------------------|--------------------------------------------|
| train   | `train/`, a checkpoint an epoch    | data, recipe of the training               |
| observe | `calibration/`, one checkpoint     | model, weights, calibration images, ranges |
| select  | `recipe.json`, `recipes/NAME.json` | the same, grouping, score, layers, search  |

Of several processes the main one reads, writes and calibrates, and tells the others; all search.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import setup
from experiments.checks import field
from flexiq_jax import (
  checkpoint,
  distributed,
  flexiq,
  grouping,
  rules,
  runtime,
  search,
  selection,
  train,
)
from flexiq_jax.calibration import BINS, Values
from flexiq_jax.checkpoint import Checkpoints
from flexiq_jax.files import to_plain
from flexiq_jax.metrics import Writer
from flexiq_jax.search import SearchSettings
from flexiq_jax.selection import recipe as recipes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
  """The stages of one run.

  Attributes:
    config: the config.
    inputs: what `setup.prepare` made of it.
    workdir: folder of the run.
    writer: of the workdir.
  """

  config: Any
  inputs: setup.Inputs
  workdir: Path
  writer: Writer

  def train(self, module):
    """Trains a module from scratch, from the last checkpoint on.

    Args:
      module: an `nnx.Module` with initial weights; it is trained in place.
    """
    done = 0
    settings = self.inputs.settings.train
    with (
      field("config.train", self.config.train),
      runtime.Progress("training, epochs", settings.epochs) as progress,
    ):

      def log(entry: train.EpochLog) -> None:
        nonlocal done
        self.writer.event("train", **dataclasses.asdict(entry))
        note = f"loss {entry.loss:.3f}, top-1 {entry.train_top1:.1f} %"
        if entry.held_out_top1 is not None:
          note += f", held out {entry.held_out_top1:.1f} %"
        progress.update(entry.epoch - done, note)
        done = entry.epoch

      train.fit(
        module,
        self.inputs.calibration,
        self.inputs.settings.preprocess,
        settings=settings,
        checkpoint_dir=self.workdir / "train",
        progress=log,
      )

  def observe(self, network: flexiq.Network, batches: list[np.ndarray]) -> flexiq.Observations:
    """Calibration statistics of a network on `batches`, each `[B, H, W, C]`."""
    template = {
      layer.name: {
        "counts": np.zeros(BINS, np.int64),
        "edges": np.zeros(BINS + 1, np.float64),
        "codes": np.zeros((layer.in_channels, 256), np.int64),
      }
      for layer in network.layers
    }
    tree = self._statistics(network, batches, template) if distributed.is_main() else None
    if distributed.several():
      data = distributed.broadcast_bytes(checkpoint.pack(tree) if tree else None)
      assert data is not None
      tree, _ = checkpoint.unpack(template, data)
    assert tree is not None
    return flexiq.Observations(
      values={n: Values(np.asarray(t["counts"]), np.asarray(t["edges"])) for n, t in tree.items()},
      codes={name: np.asarray(t["codes"]) for name, t in tree.items()},
    )

  def _statistics(self, network: flexiq.Network, batches: list[np.ndarray], template) -> Any:
    """What `observe` keeps: layer name -> counts, edges and codes."""
    made_from = _calibrated_on(self.config)
    with Checkpoints(self.workdir / "calibration", keep=1) as checkpoints:
      found = checkpoints.restore_latest(template)
      if found is not None and found.metadata == made_from:
        return found.tree
      images = sum(map(len, batches))
      with PassProgress(images) as progress:
        observed = flexiq.observe(network, batches, self.inputs.settings.ranges, progress)
      tree = {
        name: {"counts": v.counts, "edges": v.edges, "codes": observed.codes[name]}
        for name, v in observed.values.items()
      }
      checkpoints.save(found.step + 1 if found else 0, tree, made_from)
      self.writer.event("calibrated", images=images)
      return tree

  def select(
    self,
    path: Path,
    settings: grouping.LowSettings,
    network: flexiq.Network,
    base: rules.QModel,
    observations: flexiq.Observations,
    batches: list[np.ndarray],
    search: SearchSettings,
  ) -> flexiq.FlexiQ:
    """Selection of an order, kept as a recipe file; what is evaluated is what the file says.

    Args:
      path: the recipe file.
      settings: how channels are grouped and lowered.
      network: the float model.
      base: its 8-bit model.
      observations: of the network on `batches`.
      batches: calibration images, `[B, H, W, C]` each.
      search: how the order is found.
    """
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
      groups = flexiq.group(network, base, observations, self.inputs.selectable, settings)
      model = flexiq.lower(network, base, groups, settings)
      order = self._order(path.stem, network, model, groups, batches, search, made_from)
      levels = {*recipes.LEVELS, *(search.levels if searched else ())}
      schedule, groups = flexiq.lay_out(
        network, base, observations, groups, order, settings, levels
      )
      recipe = flexiq.to_recipe(
        flexiq.FlexiQ(network, model, schedule),
        groups,
        model_name=self.config.model,
        method=search.method,
        seed=self.config.seed,
        ranges=self.inputs.settings.ranges,
        settings=settings,
      )
      recipe = dataclasses.replace(recipe, settings=made_from)
      recipes.save(path, recipe)
      shutil.rmtree(self.workdir / "search", ignore_errors=True)  # the recipe takes its place
    return flexiq.from_recipe(network, recipe, self.config.dynamic)

  @staticmethod
  def _kept(path: Path) -> recipes.Recipe | None:
    """The recipe that the main process has at a path, None where it has none."""
    text = path.read_bytes() if path.is_file() else None
    if distributed.several():
      text = distributed.broadcast_bytes(text)
      if text is not None and not distributed.is_main():
        path.write_bytes(text)
    return None if text is None else recipes.load(path)

  def _order(
    self, name, network, model, groups, batches, settings: SearchSettings, made_from
  ) -> np.ndarray:
    """Scores the groups and searches their order."""
    space = flexiq.space(network, groups)
    with PassProgress(sum(map(len, batches)), f"{name}, ") as progress:
      images = batches if self.config.score == "exact" else None
      scores = distributed.agree_array(flexiq.score(network, model, groups, images, progress))
    if settings.method == "greedy":
      self.writer.event("selected", recipe=name, method="greedy", groups=space.total)
      return selection.greedy(space, scores)
    with field("config.search", self.config.search):
      found = search.search(
        network,
        model,
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
    self.writer.event(
      "selected",
      recipe=name,
      method=settings.method,
      groups=space.total,
      fitness={f"{level:g}": value for level, value in found.fitness.items()},
      forwards=found.forwards,
      seconds=found.seconds,
    )
    return found.order


class PassProgress:
  """Shows the calibration passes one after the other: called as `progress(pass, examples done)`."""

  def __init__(self, total: int, prefix: str = ""):
    """Prepares the display.

    Args:
      total: examples in each pass.
      prefix: in front of the name of the pass.
    """
    self._total, self._prefix = total, prefix
    self._name, self._done = "", 0
    self._bar: runtime.Progress | None = None

  def __enter__(self) -> "PassProgress":
    return self

  def __call__(self, name: str, done: int) -> None:
    if self._bar is None or name != self._name:
      self.__exit__(None, None, None)
      self._name, self._done = name, 0
      self._bar = runtime.Progress(f"{self._prefix}{name}, images", self._total)
      self._bar.__enter__()
    self._bar.update(done - self._done)
    self._done = done

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if self._bar is not None:
      self._bar.__exit__(kind, *error)
      self._bar = None


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of a recipe that may be older than one of the fields."""
  return {**settings, "groups": {"shift_block": 0, "whole_heads": False, **settings["groups"]}}


def _calibrated_on(config) -> dict[str, Any]:
  """The fields that the calibration statistics depend on."""
  names = ("model", "model_args", "dtype", "weights", "seed", "calibration", "preprocess", "ranges")
  if config.weights == "train":
    names += ("train",)
  return {name: to_plain(config[name]) for name in names}
