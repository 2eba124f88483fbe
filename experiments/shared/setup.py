"""From a config to a model, weights and data, with everything opened before work starts."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared import identity, pretrained, teachers
from experiments.shared.checks import Settings, check, field
from flexiq_jax import data, graph, models
from flexiq_jax.adaptive import recipe_settings
from flexiq_jax.graph import tracing
from flexiq_jax.orders import recipes, weights
from flexiq_jax.quant import grouping, selectable
from flexiq_jax.runs import files, process
from flexiq_jax.runs.progress import Progress

WEIGHTS = "a safetensors file, hf:owner/repository, train or random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
  """What a config means for its model, before there are weights.

  Attributes:
    config: the config.
    settings: its values, checked.
    module: the model, abstract.
    layers: its layers.
    skipped: contractions with parameters that are no layers.
    shared: layer name -> what has the same weights (see `graph.shared`).
    groups: layer name -> number of its channel groups; only layers that may go to 4 bits.
  """

  config: Any
  settings: Settings
  module: Any
  layers: tuple[graph.Layer, ...]
  skipped: tuple
  shared: Mapping[str, str]
  groups: dict[str, int]

  @property
  def selectable(self) -> tuple[str, ...]:
    """Names of the layers that may go to 4 bits."""
    return tuple(self.groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs(Described):
  """The same with what it reads.

  Attributes:
    evaluation, calibration: image sources.
    params: pretrained parameters, None where weights are trained or random.
    recipe: the recipe to evaluate, None where the run makes its own.
    teacher: see `teachers.load`.
  """

  evaluation: data.Source
  calibration: data.Source
  params: Any
  recipe: recipes.Recipe | None
  teacher: tuple[models.Apply, Any] | None

  @property
  def evaluated(self) -> int:
    """How many evaluation images a row is measured on."""
    return min(self.config.data.limit or len(self.evaluation), len(self.evaluation))

  def build(self) -> nnx.Module:
    """The model with random weights."""
    return _build(self.config, self.settings)

  @functools.cached_property
  def calibration_set(self) -> tuple[list[np.ndarray], np.ndarray]:
    """The calibration images `[B, H, W, C]`, the last batch perhaps shorter; labels int32 `[n]`."""
    part = self.config.calibration
    with field("config.calibration", part):
      indices = data.calibration_indices(self.calibration, part.images, self.config.seed)
      batches = [*self._batches(self.calibration, part.batch_size, indices)]
    labels = np.concatenate([batch.labels[batch.mask] for batch in batches]).astype(np.int32)
    return [batch.images[batch.mask] for batch in batches], labels

  def held_out_batch(self, count: int) -> data.Batch:
    """Training images that calibrate nothing, drawn by the seed."""
    part, source = self.config.calibration, self.calibration
    used = data.calibration_indices(source, part.images, self.config.seed)
    left = np.setdiff1d(np.arange(len(source)), used)
    drawn = np.random.default_rng(self.config.seed).permutation(left)[:count]
    with field("config.calibration", part):
      return next(iter(self._batches(source, len(drawn), np.sort(drawn))))

  def evaluation_batches(self) -> Iterator[data.Batch]:
    """A fresh stream over the evaluation images."""
    size = min(self.config.batch_size, self.evaluated)
    with field("config", self.config):
      return self._batches(self.evaluation, size, np.arange(self.evaluated))

  @contextlib.contextmanager
  def shown_batches(self, label: str) -> Iterator[Iterator[data.Batch]]:
    """`evaluation_batches` for one row of results, with a display of how far it is."""
    batches = self.evaluation_batches()
    with Progress(f"{label}, images", self.evaluated) as progress:

      def counted():
        with field("config.data", self.config.data):  # of reading, not of the model
          for batch in batches:
            yield batch
            progress.update(int(batch.mask.sum()))

      yield counted()

  def _batches(self, source: data.Source, size: int, indices: np.ndarray) -> Iterator[data.Batch]:
    return data.batches(source, self.settings.preprocess, size, indices=indices)


def describe(config) -> Described:
  """Checks a config and traces its model without making its weights.

  Raises:
    ValueError: a value is wrong; names the field.
  """
  settings = check(config)
  with field("config.model_args"):
    module: Any = nnx.eval_shape(lambda: _build(config, settings))
  height, width, channels = module.input_shape
  preprocess = settings.preprocess
  if (preprocess.crop, preprocess.channels) != (height, channels) or height != width:
    raise ValueError(
      f"config.preprocess: crop {preprocess.crop} and {preprocess.channels} values of mean and std "
      f"give images {preprocess.crop}x{preprocess.crop}x{preprocess.channels}; "
      f"model {config.model!r} takes {height}x{width}x{channels}"
    )
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  traced = tracing.trace(apply, params, x)
  layers = tuple(traced.layers.values())
  with field("config", config):
    names = selectable(
      layers,
      keep8=tuple(config.keep8),
      first_last=config.keep_first_last,
      depthwise=config.select_depthwise,
    )
  runs = graph.run_lengths(apply, params, x) if settings.groups.whole_heads else {}
  return Described(
    config=config,
    settings=settings,
    module=module,
    layers=layers,
    skipped=traced.skipped,
    shared=traced.shared,
    groups={
      layer.name: grouping.group_count(
        layer.in_channels, settings.groups, max(1, runs.get(layer.name, 1))
      )
      for layer in layers
      if layer.name in names
    },
  )


def prepare(config) -> Inputs:
  """Checks a config and opens what it reads; all that is missing is told at once.

  Raises:
    ValueError: a value is wrong, or weights, data or a recipe are missing or do not fit; one line
      for each, with the field's name.
  """
  described = describe(config)
  found, problems, missing = {}, [], False
  for name, action in {
    "evaluation": lambda: _open_data(config, "data", described),
    "calibration": lambda: _open_data(config, "calibration", described),
    "params": lambda: _load_params(config, described),
    "recipe": lambda: _load_recipe(config, described),
    "teacher": lambda: teachers.load(config, described.settings, described.module),
  }.items():
    try:
      found[name] = action()
    except (ValueError, OSError) as error:
      problems.append(str(error))
      missing |= isinstance(error.__cause__, FileNotFoundError) and name != "recipe"
  if problems:
    problems = _merge(problems)
    if missing and not config.name.endswith("_runlocal"):
      problems.append("to try the pipeline with neither: --config=FILE.py:runlocal")
    raise ValueError("\n".join(problems))
  with field("config.calibration"):
    data.require_separate(found["calibration"], found["evaluation"])
  images, source = config.calibration.images, found["calibration"]
  if not config.recipe and images > len(source):
    raise ValueError(f"config.calibration.images: {images}; 1..{len(source)} is accepted, {source}")
  train = described.settings.train
  trained_on = len(source) - round(train.held_out * len(source))
  if config.weights == "train" and train.batch_size > trained_on:
    raise ValueError(
      f"config.train.batch_size: {train.batch_size}; 1..{trained_on} is accepted: so many images "
      f"of {source} are trained on"
    )
  return Inputs(
    **{f.name: getattr(described, f.name) for f in dataclasses.fields(Described)}, **found
  )


def data_name(config) -> str:
  """What the evaluation images are called, in titles and rows."""
  return Path(config.data.root or config.data.name).name


def provenance(config) -> dict[str, str]:
  """What tells a run's rows apart from those of other runs, as columns."""
  commit = process.git_commit(Path(__file__)) or ""
  return {
    "model": config.model,
    "data": data_name(config),
    "config": f"{config.name}-{files.digest(identity.plain(config))}",
    "commit": commit,
  }


def default_workdir(config, overrides: Mapping[str, Any]) -> Path:
  """Where a run goes that names no workdir.

  Args:
    config: the config.
    overrides: dotted field -> value from the command line. Model and seed are in the path; for the
      rest it gets a digest, so that another run of the same config goes elsewhere.
  """
  path = Path("runs") / config.name / config.model / f"seed{config.seed}"
  other = {k: v for k, v in overrides.items() if k not in ("name", "model", "seed")}
  return path.with_name(f"{path.name}-{files.digest(other)}") if other else path


def _build(config, settings: Settings) -> nnx.Module:
  return models.create(config.model, seed=config.seed, dtype=config.dtype, **settings.model_args)


def _open_data(config, name: str, described: Described) -> data.Source:
  part = config[name]
  with field(f"config.{name}", part):
    classes = described.module.num_classes
    return data.open_source(part.name, part.split, root=part.root or None, num_classes=classes)


def _load_params(config, described: Described) -> Any:
  if not config.weights:
    raise ValueError(f"config.weights: empty; give {WEIGHTS}")
  if config.weights in ("train", "random"):
    return None
  return pretrained.load(config, "config", described.module)


def _load_recipe(config, described: Described) -> recipes.Recipe | None:
  if not config.recipe:
    return None
  with field("config.recipe"):
    path = data.expand_path(config.recipe)
  with field("config", config):
    recipe = recipes.load(path)
    if recipe.weights:
      weights.load(path, recipe)  # before hours are spent
    recipes.require_fit(recipe, described.layers)
    recipe_settings(recipe)
  return recipe


def _merge(problems: list[str]) -> list[str]:
  """Joins problems that differ in the field only: one missing dataset is one message."""
  fields: dict[str, list[str]] = {}
  for problem in problems:
    name, _, text = problem.partition(": ")
    fields.setdefault(text, []).append(name)
  return [": ".join((" and ".join(names), text)) for text, names in fields.items()]
