"""From a config to a model, data and settings, with everything checked before work starts.

Functions of the package take plain arguments and name those in their errors; here the config's
field is put in front, so that a message says where to change what.
"""

import ast
import contextlib
import dataclasses
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax import data, flexiq, graph, models
from flexiq_jax.calibration import RangeSettings
from flexiq_jax.grouping import LowSettings
from flexiq_jax.selection import recipe as recipes
from flexiq_jax.train_recipe import TrainSettings

_TOP = (
  *("experiment", "name", "seed", "model", "model_args", "dtype", "weights", "recipe", "train"),
  *("batch_size", "preprocess", "ranges", "groups", "dynamic", "score", "ratios", "random_seeds"),
  *("variants", "keep8", "keep_first_last", "select_depthwise"),
)
_FIELDS = {  # section -> what a config has to have there
  "": _TOP,
  "data": ("name", "root", "split", "limit"),
  "calibration": ("name", "root", "split", "images", "batch_size"),
}
WEIGHTS = "a safetensors file, hf:owner/repository, train or random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A config's values, checked.

  Attributes:
    model_args: overrides of the model's arguments.
    preprocess: of the images.
    ranges, groups: of quantization.
    train: of training from scratch.
    ratios: 4-bit ratios, ascending.
  """

  model_args: dict[str, Any]
  preprocess: data.Preprocess
  ranges: RangeSettings
  groups: LowSettings
  train: TrainSettings
  ratios: tuple[float, ...]


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


def check(config) -> Settings:
  """Reads and checks all values of a config that need neither weights nor data."""
  for section, names in _FIELDS.items():
    part = config.get(section, {}) if section else config
    if missing := [name for name in names if name not in part]:
      name = ".".join(filter(None, ("config", section, missing[0])))
      raise ValueError(f"{name}: missing; configs/common.py has all fields")
  if not 0 <= config.seed < 2**31:
    raise ValueError(f"config.seed: {config.seed} is not in 0..{2**31 - 1}")
  if config.dtype not in models.registry.DTYPES:
    raise ValueError(
      f"config.dtype: {config.dtype!r} is not one of {', '.join(models.registry.DTYPES)}"
    )
  with field("config.model"):
    spec = models.get(config.model)
  with field("config.model_args"):
    model_args = _model_args(config.model_args, spec)
  given = {k: v for k, v in config.preprocess.items() if v is not None}
  if given.get("resize") == 0:
    given["resize"] = None
  usual = {k: getattr(spec, k) for k in ("resize", "crop", "interpolation", "mean", "std")}
  with field("config.preprocess", config.preprocess):
    preprocess = data.Preprocess(**(usual | given))
  with field("config.ranges", config.ranges):
    ranges = RangeSettings(**config.ranges)
  with field("config.groups", config.groups):
    groups = LowSettings(**config.groups)
  with field("config.train", config.train):
    train = TrainSettings(seed=config.seed, **config.train)
  if config.score not in ("exact", "range"):
    raise ValueError(f"config.score: {config.score!r} is not one of exact, range")
  for name in ("batch_size", "calibration.batch_size", "calibration.images"):
    value = config
    for part in name.split("."):
      value = value[part]
    if value < 1:
      raise ValueError(f"config.{name}: {value} is not a positive number")
  if config.data.limit < 0:
    raise ValueError(f"config.data.limit: {config.data.limit} is negative; 0 takes all images")
  return Settings(
    model_args=model_args,
    preprocess=preprocess,
    ranges=ranges,
    groups=groups,
    train=train,
    ratios=_ratios(config.ratios),
  )


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
    selectable = flexiq.selectable(
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
    selectable=selectable,
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


def evaluation_count(config, inputs: Inputs) -> int:
  """How many images a row is measured on."""
  return min(config.data.limit or len(inputs.evaluation), len(inputs.evaluation))


def default_workdir(config) -> Path:
  """Where a run goes that names no workdir."""
  return Path("runs") / config.name / config.model / f"seed{config.seed}"


@contextlib.contextmanager
def field(name: str, known: Container[str] = ()) -> Iterator[None]:
  """Puts the config field's name in front of a ValueError or FileNotFoundError.

  Args:
    name: the field or section, as `config.train`.
    known: fields of that section. Where the message begins with one of them, as `epochs is 0`, it
      is joined by a dot: `config.train.epochs is 0`.
  """
  try:
    yield
  except (ValueError, OSError) as error:
    text = str(error)
    if text.startswith("config."):
      raise
    first = re.match(r"(\w+)(: | is )", text)
    joint = "." if first and first[1] in known else ": "
    raise ValueError(f"{name}{joint}{text}") from error


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
    flexiq.recipe_settings(recipe)
  return recipe


def _merge(problems: list[str]) -> list[str]:
  """Joins problems that differ in the field only: one missing dataset is one message."""
  fields: dict[str, list[str]] = {}
  for problem in problems:
    name, _, text = problem.partition(": ")
    fields.setdefault(text, []).append(name)
  return [": ".join((" and ".join(names), text)) for text, names in fields.items()]


def _model_args(text: str, spec: models.ModelSpec) -> dict[str, Any]:
  args: dict[str, Any] = {}
  for part in re.split(r",(?![^(\[]*[)\]])", text):  # commas outside of brackets
    name, equals, value = (p.strip() for p in part.partition("="))
    if not name:
      continue
    if name == "tiny" and not equals:
      args |= spec.tiny
      continue
    try:
      args[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      raise ValueError(
        f"{part.strip()!r} is not name=value with a Python number, string or tuple"
      ) from None
  return args


def _ratios(ratios) -> tuple[float, ...]:
  for ratio in ratios:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
      raise ValueError(f"config.ratios: {ratio!r} is not a number in 0..1")
  if not ratios:
    raise ValueError("config.ratios: empty; give numbers in 0..1, as (0.0, 0.5, 1.0)")
  return tuple(sorted({float(ratio) for ratio in ratios}))
