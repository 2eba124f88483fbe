"""From a config to a model, data and settings, with everything checked before work starts.

Functions of the package take plain arguments and name those in their errors; here the config's
field is put in front, so that a message says where to change what.
"""

import ast
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax import data, flexiq, graph, models
from flexiq_jax.calibration import RangeSettings
from flexiq_jax.grouping import LowSettings
from flexiq_jax.train_recipe import TrainSettings

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


def check(config) -> Settings:
  """Reads and checks all values of a config that need neither weights nor data."""
  spec = models.get(config.model)
  with field("config.model_args"):
    model_args = _model_args(config.model_args, spec)
  given = {k: v for k, v in config.preprocess.items() if v is not None}
  if given.get("resize") == 0:
    given["resize"] = None
  usual = {k: getattr(spec, k) for k in ("resize", "crop", "interpolation", "mean", "std")}
  with field("config.preprocess"):
    preprocess = data.Preprocess(**(usual | given))
  with field("config.ranges"):
    ranges = RangeSettings(**config.ranges)
  with field("config.groups"):
    groups = LowSettings(**config.groups)
  with field("config.train"):
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
  if config.seed < 0:
    raise ValueError(f"config.seed: {config.seed} is negative")
  return Settings(
    model_args=model_args,
    preprocess=preprocess,
    ranges=ranges,
    groups=groups,
    train=train,
    ratios=_ratios(config.ratios),
  )


def abstract_layers(config, settings: Settings) -> tuple[tuple[graph.Layer, ...], tuple, Any]:
  """Layers and skipped contractions of the config's model without making its weights.

  Returns:
    (layers, skipped, the abstract module).
  """
  with field("config.model_args"):
    module = nnx.eval_shape(lambda: build(config, settings))
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  return graph.layers(apply, params, x), graph.skipped(apply, params, x), module


def build(config, settings: Settings) -> nnx.Module:
  """The config's model with random weights."""
  return models.create(config.model, seed=config.seed, dtype=config.dtype, **settings.model_args)


def selectable(config, layers) -> tuple[str, ...]:
  """Names of the layers that may go to 4 bits."""
  with field("config"):
    return flexiq.selectable(
      layers,
      keep8=tuple(config.keep8),
      first_last=config.keep_first_last,
      depthwise=config.select_depthwise,
    )


def weights_source(config) -> str:
  """The `weights` field with `{model}` filled in."""
  if not config.weights:
    raise ValueError(f"config.weights: empty; give {WEIGHTS}")
  return config.weights.replace("{model}", config.model)


def load_params(config, module) -> Any:
  """Pretrained parameters of an (abstract) module."""
  _, params = models.functional(module)
  with field("config.weights"):
    return models.weights.load(weights_source(config), module, params)


def require_inputs(config, module) -> tuple[data.Source, data.Source, Any]:
  """Opens data and weights; what is missing is told in one message.

  Returns:
    (evaluation source, calibration source, params or None where weights are trained or random).
  """
  problems, found = [], []
  classes = module.num_classes

  def open_data(name):
    part = config[name]
    with field(f"config.{name}"):
      return data.open_source(part.name, part.split, root=part.root or None, num_classes=classes)

  def load():
    if weights_source(config) in ("train", "random"):
      return None
    return load_params(config, module)

  for action in (lambda: open_data("data"), lambda: open_data("calibration"), load):
    try:
      found.append(action())
    except (ValueError, OSError) as error:
      if str(error).partition(": ")[2] not in "\n".join(problems):
        problems.append(str(error))
  if problems:
    raise ValueError("\n".join(problems))
  evaluation, calibration, params = found
  with field("config.calibration"):
    data.require_separate(calibration, evaluation)
  return evaluation, calibration, params


def calibration_batches(config, settings: Settings, source: data.Source) -> list[np.ndarray]:
  """The calibration images, `[B, H, W, C]` each, the last one possibly shorter."""
  part = config.calibration
  with field("config.calibration.images"):
    indices = data.calibration_indices(source, part.images, config.seed)
  with field("config.calibration"):
    batches = data.batches(source, settings.preprocess, part.batch_size, indices=indices)
    return [batch.images[batch.mask] for batch in batches]


def evaluation_batches(config, settings: Settings, source: data.Source):
  """A fresh stream over the evaluation images, and their number."""
  count = min(config.data.limit or len(source), len(source))
  with field("config.data"):
    batches = data.batches(source, settings.preprocess, config.batch_size, indices=np.arange(count))
  return batches, count


def default_workdir(config) -> Path:
  """Where a run goes that names no workdir."""
  return Path("runs") / config.name / config.model / f"seed{config.seed}"


@contextlib.contextmanager
def field(name: str) -> Iterator[None]:
  """Puts the config field's name in front of a ValueError or FileNotFoundError."""
  try:
    yield
  except (ValueError, OSError) as error:
    text = str(error)
    if text.startswith("config."):
      raise
    joint = "." if re.match(r"\w+(: | is )", text) and not text.startswith("dataset") else ": "
    raise ValueError(f"{name}{joint}{text}") from error


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
