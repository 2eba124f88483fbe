"""From a config to a model, weights and data, with everything opened before work starts."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared.checks import Settings, check, field
from flexiq_jax import data, graph, models
from flexiq_jax.adaptive import recipe_settings
from flexiq_jax.orders import recipe as recipes
from flexiq_jax.quant.selectable import selectable
from flexiq_jax.runs.progress import Progress

WEIGHTS = "a safetensors file, hf:owner/repository, train or random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a config means for its model, before there are weights.

  Attributes:
    settings: the config's values.
    module: the model, abstract.
    layers: its layers.
    skipped: contractions with parameters that are no layers.
    selectable: names of the layers that may go to 4 bits.
  """

  settings: Settings
  module: Any
  layers: tuple[graph.Layer, ...]
  skipped: tuple
  selectable: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs(Plan):
  """A plan with what it reads.

  Attributes:
    evaluation, calibration: image sources.
    params: pretrained parameters, None where weights are trained or random.
    recipe: the recipe to evaluate, None where the run makes its own.
  """

  evaluation: data.Source
  calibration: data.Source
  params: Any
  recipe: recipes.Recipe | None


def plan(config) -> Plan:
  """Checks a config and traces its model without making its weights.

  Raises:
    ValueError: a value is wrong; names the field.
  """
  settings = check(config)
  with field("config.model_args"):
    module: Any = nnx.eval_shape(lambda: build(config, settings))
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
  layers = graph.layers(apply, params, x)
  with field("config", config):
    names = selectable(
      layers,
      keep8=tuple(config.keep8),
      first_last=config.keep_first_last,
      depthwise=config.select_depthwise,
    )
  return Plan(
    settings=settings,
    module=module,
    layers=layers,
    skipped=graph.skipped(apply, params, x),
    selectable=names,
  )


def prepare(config) -> Inputs:
  """Checks a config and opens what it reads; all that is missing is told at once.

  Raises:
    ValueError: a value is wrong, or weights, data or a recipe are missing or do not fit; one line
      for each, with the field's name.
  """
  planned = plan(config)
  found, problems, missing = {}, [], False
  for name, action in {
    "evaluation": lambda: _open_data(config, "data", planned),
    "calibration": lambda: _open_data(config, "calibration", planned),
    "params": lambda: _load_params(config, planned),
    "recipe": lambda: _load_recipe(config, planned),
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
  train = planned.settings.train
  trained_on = len(source) - round(train.held_out * len(source))
  if config.weights == "train" and train.batch_size > trained_on:
    raise ValueError(
      f"config.train.batch_size: {train.batch_size}; 1..{trained_on} is accepted: so many images "
      f"of {source} are trained on"
    )
  return Inputs(**{f.name: getattr(planned, f.name) for f in dataclasses.fields(Plan)}, **found)


def build(config, settings: Settings) -> nnx.Module:
  """The config's model with random weights."""
  return models.create(config.model, seed=config.seed, dtype=config.dtype, **settings.model_args)


def calibration_batches(config, inputs: Inputs) -> list[np.ndarray]:
  """The calibration images, `[B, H, W, C]` each, the last one possibly shorter."""
  part = config.calibration
  with field("config.calibration", part):
    indices = data.calibration_indices(inputs.calibration, part.images, config.seed)
    batches = data.batches(
      inputs.calibration, inputs.settings.preprocess, part.batch_size, indices=indices
    )
    return [batch.images[batch.mask] for batch in batches]


def evaluation_batches(config, inputs: Inputs) -> tuple[Iterator[data.Batch], int]:
  """A fresh stream over the evaluation images, and their number."""
  count = evaluation_count(config, inputs)
  with field("config", config):
    batches = data.batches(
      inputs.evaluation,
      inputs.settings.preprocess,
      min(config.batch_size, count),
      indices=np.arange(count),
    )
  return batches, count


@contextlib.contextmanager
def shown_batches(config, inputs: Inputs, label: str) -> Iterator[Iterator[data.Batch]]:
  """`evaluation_batches` for one row of results, with a display of how far it is."""
  batches, count = evaluation_batches(config, inputs)
  with Progress(f"{label}, images", count) as progress:

    def counted():
      with field("config.data", config.data):  # of reading, not of the model
        for batch in batches:
          yield batch
          progress.update(int(batch.mask.sum()))

    yield counted()


def evaluation_count(config, inputs: Inputs) -> int:
  """How many images a row is measured on."""
  return min(config.data.limit or len(inputs.evaluation), len(inputs.evaluation))


def default_workdir(config) -> Path:
  """Where a run goes that names no workdir."""
  return Path("runs") / config.name / config.model / f"seed{config.seed}"


def _open_data(config, name: str, planned: Plan) -> data.Source:
  part = config[name]
  with field(f"config.{name}", part):
    classes = planned.module.num_classes
    return data.open_source(part.name, part.split, root=part.root or None, num_classes=classes)


def _load_params(config, planned: Plan) -> Any:
  if not config.weights:
    raise ValueError(f"config.weights: empty; give {WEIGHTS}")
  if config.weights in ("train", "random"):
    return None
  source = config.weights.replace("{model}", config.model)
  _, params = models.functional(planned.module)
  # Overrides make another model than the name says.
  model = planned.module if config.model_args else config.model
  with field("config.weights"):
    return models.weights.load(source, model, params)


def _load_recipe(config, planned: Plan) -> recipes.Recipe | None:
  if not config.recipe:
    return None
  with field("config.recipe"):
    path = data.expand_path(config.recipe)
  with field("config", config):
    recipe = recipes.load(path)
    recipes.require_fit(recipe, planned.layers)
    recipe_settings(recipe)
  return recipe


def _merge(problems: list[str]) -> list[str]:
  """Joins problems that differ in the field only: one missing dataset is one message."""
  fields: dict[str, list[str]] = {}
  for problem in problems:
    name, _, text = problem.partition(": ")
    fields.setdefault(text, []).append(name)
  return [": ".join((" and ".join(names), text)) for text, names in fields.items()]
