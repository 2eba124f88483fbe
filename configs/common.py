"""Fields that all configs share, and the arguments after the colon of `--config=x.py:...`.

A config describes one run. Every field can be overridden, as `--config.groups.group_size=8`. Paths
may use environment variables (`$FLEXIQ_DATA/...`), and `weights` may use `{model}`.
"""

import dataclasses
import importlib
from typing import Any

from ml_collections import config_dict

from flexiq_jax.finetuning import ImageSettings, ReconstructionSettings
from flexiq_jax.quant import LowSettings, RangeSettings
from flexiq_jax.search import SearchSettings
from flexiq_jax.training import TrainSettings

# Further rows that show what each part of the method contributes (see experiments/curve.py).
VARIANTS = ("naive", "range", "per_output", "uncorrected", "dynamic")
BRIEF = ("naive", "uncorrected")


def parse_arg(arg: str | None, **defaults):
  """Reads `runlocal,batch=64` into a ConfigDict.

  Args:
    arg: comma-separated `name=value`; a bare name means true.
    **defaults: the accepted names; a value is converted to the default's type.

  Raises:
    ValueError: an unknown name, or a value of another type.
  """
  options = config_dict.ConfigDict(defaults)
  for part in (arg or "").split(","):
    if not part:
      continue
    name, _, text = part.partition("=")
    if name not in defaults:
      raise ValueError(f"config argument {name!r} is unknown; accepted: {', '.join(defaults)}")
    kind = type(defaults[name])
    if kind is bool:
      if text.lower() not in ("", "true", "false"):
        raise ValueError(f"config argument {name}={text!r}: true or false is accepted")
      options[name] = text.lower() != "false"
    else:
      try:
        options[name] = kind(text)
      except ValueError:
        raise ValueError(f"config argument {name}={text!r}: {kind.__name__} is accepted") from None
  return options


def settings(value: Any) -> config_dict.ConfigDict:
  """The fields of a settings dataclass, which says what they mean, with their values."""
  return config_dict.ConfigDict(dataclasses.asdict(value))


def defaults(name: str, model: str) -> config_dict.ConfigDict:
  """The fields of the experiment `curve`, with their defaults.

  Args:
    name: of the config, for the default workdir.
    model: a name in `flexiq_jax.models.MODELS`.
  """
  config = config_dict.ConfigDict()
  config.name = name
  config.experiment = "curve"
  config.seed = 0

  config.model = model
  # Overrides of the model's arguments, as "depth=2,width=64"; "tiny" is a small model of the kind.
  config.model_args = ""
  config.dtype = "float32"
  # A safetensors file, hf:owner/repo, `train` (from scratch), or `random` (pipeline only).
  config.weights = ""
  # Evaluates an existing recipe.json instead of calibrating and selecting.
  config.recipe = ""
  # Whether the recipe may have been made for other weights than the model has.
  config.other_weights = False

  # Evaluation images; `limit` takes the first so many (0: all).
  config.data = config_dict.create(name="", root="", split="test", limit=0)
  # Training images: for calibration, and for weights=train.
  config.calibration = config_dict.create(
    name="", root="", split="train", images=512, batch_size=64
  )
  config.batch_size = 100
  # What is None is the model's own preprocessing; resize 0 leaves images as they are.
  config.preprocess = config_dict.create(
    resize=config_dict.placeholder(int),
    crop=config_dict.placeholder(int),
    interpolation=config_dict.placeholder(str),
    mean=config_dict.placeholder(tuple),
    std=config_dict.placeholder(tuple),
  )

  config.ranges = settings(RangeSettings())
  config.groups = settings(LowSettings())
  config.dynamic = False
  # Layers that stay 8-bit: first and last, depthwise, and these regular expressions.
  config.keep8 = ()
  config.keep_first_last = True
  config.select_depthwise = False

  config.score = "exact"
  config.search = settings(SearchSettings())
  # Orders of other methods that get rows, too: greedy, gram, evolution.
  config.compare = ("greedy",)
  config.ratios = (0.0, 0.25, 0.5, 0.75, 1.0)
  config.random_seeds = (0, 1, 2)
  # Further rows of the greedy order; see experiments/curve.py for their names.
  config.variants = ()

  config.train = settings(TrainSettings())
  del config.train.seed  # the run's
  # What is done to the weights for the run's own order: `reconstruct`, `distill`, `finetune`; and
  # whether uniform INT4 is finetuned, too. See experiments/shared/tuned.py.
  config.tune = ()
  config.tune_int4 = False
  # The float model whose logits training wants; empty is the model itself. Another one, as a rule a
  # larger one, takes the same images; `weights` as above, but for `train`.
  config.teacher = config_dict.create(model="", model_args="", weights="")
  config.reconstruct = settings(ReconstructionSettings())
  config.distill = settings(ImageSettings())
  config.finetune = settings(ImageSettings(images=0, steps=2400, batch_size=64, refit=800))
  return config


def cifar10(name: str, model: str, weights: str, arg: str | None) -> config_dict.ConfigDict:
  """A CIFAR-10 model with weights and images from $FLEXIQ_DATA.

  Args:
    name: of the config.
    model: a name in `flexiq_jax.models.MODELS`.
    weights: where its pretrained weights are.
    arg: `runlocal` needs no data and takes seconds.
  """
  options = parse_arg(arg, runlocal=False)
  config = defaults(name, model)
  config.weights = weights
  config.data.name = config.calibration.name = "cifar10"
  config.data.root = config.calibration.root = "$FLEXIQ_DATA/cifar10"
  config.batch_size = 500
  config.calibration.batch_size = 128
  config.variants = VARIANTS
  if options.runlocal:
    runlocal(config)
  return config


def mobile(name: str, model: str, weights: str, arg: str | None) -> config_dict.ConfigDict:
  """An ImageNet model with weights and photographs from $FLEXIQ_DATA.

  Args:
    name: of the config.
    model: a name in `flexiq_jax.models.MODELS`.
    weights: where its pretrained weights are.
    arg: `runlocal`, and `imagenet` (evaluate on ImageNet-2012 instead of the photographs).
  """
  options = parse_arg(arg, runlocal=False, imagenet=False)
  config = imagenet(name, model, weights, None)
  if not options.imagenet:
    photographs(config)
  # 224 x 224 pixels on a CPU: seconds a step. Few images a step have noisy gradients, and with Adam
  # weights walk as far as their rate says; at 0.05 they walk further than 8-bit rounding.
  config.distill.update(
    steps=300, batch_size=8, learning_rate=0.02, balance=0.5, every=50, refit=150
  )
  config.variants = BRIEF
  config.random_seeds = (0,)
  if options.runlocal:
    runlocal(config)
  return config


def other(of: str, arg: str | None) -> config_dict.ConfigDict:
  """The config of another file in configs/.

  Args:
    of: its name.
    arg: its argument.

  Raises:
    ValueError: there is no such file.
  """
  try:
    return importlib.import_module(f"configs.{of}").get_config(arg)
  except ModuleNotFoundError:
    raise ValueError(f"config argument of={of!r}: there is no configs/{of}.py") from None


def of_other(name: str, of: str, small: bool) -> config_dict.ConfigDict:
  """An experiment with the model of another config.

  Args:
    name: of the experiment.
    of: the other config's name.
    small: its variant `runlocal`.
  """
  config = other(of, "runlocal" if small else None)
  config.experiment = name
  config.name = f"{name}_{of}" + ("_runlocal" if small else "")
  return config


def imagenet(name: str, model: str, weights: str, arg: str | None) -> config_dict.ConfigDict:
  """An ImageNet model: hub weights and ImageNet-2012, or what the arguments say.

  Args:
    name: of the config.
    model: a name in `flexiq_jax.models.MODELS`.
    weights: where its pretrained weights are.
    arg: `runlocal` (tiny random network, embedded digits, seconds, no download) and `folder`
      (labelled photographs in $FLEXIQ_DATA instead of ImageNet).
  """
  options = parse_arg(arg, runlocal=False, folder=False)
  config = defaults(name, model)
  config.weights = weights
  config.batch_size = 50
  config.calibration.batch_size = 32
  config.data.name = config.calibration.name = "imagenet"
  # Of a thousand logits most say nothing about the prediction: the divergence weighs them by it.
  config.search.update(distance="kl", images=256, probes=2, block=32)
  if options.folder:
    photographs(config)
  if options.runlocal:
    runlocal(config)
  return config


def photographs(config: config_dict.ConfigDict) -> None:
  """Calibrates on one photograph of each ImageNet class, evaluates on 500 others.

  Both sets are stored at 256 x 256, so that only the central crop is left to do.
  """
  config.data.name = config.calibration.name = "folder"
  config.data.root = "$FLEXIQ_DATA/nips2017_dev500"
  config.calibration.root = "$FLEXIQ_DATA/imagenet_sample1000"
  config.preprocess.resize = 0


def runlocal(config: config_dict.ConfigDict) -> None:
  """Makes a config small: the model's tiny variant, random weights, a few embedded images."""
  config.name += "_runlocal"
  config.weights = "random"
  config.model_args = "tiny"
  config.data = config_dict.create(name="digits", root="", split="test", limit=64)
  config.calibration = config_dict.create(
    name="digits", root="", split="train", images=32, batch_size=32
  )
  config.batch_size = 32
  config.random_seeds = (0,)
  config.ratios = (0.0, 0.5, 1.0)
  config.variants = ()
  config.search.levels = (0.5,)
  config.preprocess.resize = 32
  config.preprocess.crop = 32
