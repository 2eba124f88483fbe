"""Fields that all configs share, and the arguments behind the colon of `--config=x.py:...`.

A config describes one run. Every field can be overridden, as `--config.groups.group_size=8`. Paths
may use environment variables (`$FLEXIQ_DATA/...`), and `weights` may use `{model}`.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from flexiq_jax.finetuning import ImageSettings, ReconstructionSettings
from flexiq_jax.methods import METHODS
from flexiq_jax.quant import LowSettings, RangeSettings
from flexiq_jax.runs.sweeps.executors import local, slurm
from flexiq_jax.runs.sweeps.layouts import Layout
from flexiq_jax.search import SearchSettings
from flexiq_jax.training import TrainSettings

# Further rows that show what each part of the method contributes (see experiments/curve.py).
VARIANTS = ("naive", "range", "per_output", "uncorrected", "dynamic")
BRIEF = ("naive", "uncorrected")
# Methods of comparisons that train.
TRAINED = ("ptmq", "robustquant", "anyprecision")


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
  config.reconstruct = settings(ReconstructionSettings())
  config.distill = settings(ImageSettings())
  config.finetune = settings(ImageSettings(images=0, steps=4000, batch_size=128, refit=1000))
  return config


def sweep(
  name: str,
  bases: Mapping[str, config_dict.ConfigDict],
  *,
  axes: tuple = (),
  seeds: tuple[int, ...] = (0,),
  tables: Mapping[str, Layout],
) -> config_dict.ConfigDict:
  """A sweep: every base with every value of the axes and every seed, each an ordinary run.

  Args:
    name: of the sweep, for its folder.
    bases: name -> what `base` gives; the names begin those of the cells.
    axes: (dotted field, values) pairs.
    seeds: of the runs.
    tables: name -> layout of a table that the rows fill.
  """
  config = config_dict.ConfigDict()
  config.name, config.experiment = name, "sweep"
  # Cells whose name the regular expression `skip` is found in are left out.
  config.sweep = config_dict.create(bases=dict(bases), axes=axes, seeds=seeds, skip="")
  config.tables = {key: settings(layout) for key, layout in tables.items()}
  # Where cells run: local, slurm, print; the sections below say how.
  config.executor = "local"
  # Takes only the cells whose name this regular expression is found in.
  config.only = ""
  # Whether cells that failed run again; others are resumed in any case.
  config.retry = False
  # Only shows a sweep that runs elsewhere.
  config.watch = False
  config.local = settings(local.Settings())
  config.slurm = settings(slurm.Settings())
  return config


def base(
  file: str,
  *,
  fields: tuple = (),
  labels: tuple = (),
  minutes: float = 0.0,
  memory: float = 0.0,
  gpus: int = 0,
  tasks: int = 1,
) -> config_dict.ConfigDict:
  """A base config of a sweep.

  Args:
    file: as `configs/resnet20_cifar10.py` or `configs/ablation.py:of=vit_cifar10`.
    fields: (dotted field, value) pairs that are set.
    labels: (column, value) pairs that the rows get.
    minutes: estimated time of one run, until a finished one has shown it.
    memory: estimated host memory, GiB.
    gpus: that a run needs.
    tasks: processes of a run, under SLURM.
  """
  return config_dict.create(
    config=file,
    fields=fields,
    labels=labels,
    minutes=minutes,
    memory=memory,
    gpus=gpus,
    tasks=tasks,
  )


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
  config.variants = BRIEF
  config.random_seeds = (0,)
  if options.runlocal:
    runlocal(config)
  return config


def comparison(of: str, arg: str | None) -> config_dict.ConfigDict:
  """A table of runs of the experiment `compare`, on the model of another config.

  Args:
    of: the config's name.
    arg: its argument; `runlocal` makes the comparison small, too.
  """
  try:
    config = importlib.import_module(f"configs.{of}").get_config(arg)
  except ModuleNotFoundError:
    raise ValueError(f"config argument of={of!r}: there is no configs/{of}.py") from None
  config.experiment = "table"
  # Which runs: those of a job, one for each seed.
  config.table = config_dict.create(job="compare", seeds=(0, 1, 2))
  small = config.name.endswith("_runlocal")
  config.name = f"compare_{of}" + ("_runlocal" if small else "")
  config.comparison = config_dict.create(
    # See experiments/comparison/tables.py and flexiq_jax/methods/__init__.py; other methods are
    # named as package.module:Class.
    tables=("main", "clado_tensor", "clado_channel", "wide", "float8"),
    methods=(
      *("flexiq_greedy", "flexiq", "uniform", "quantune", "random"),
      *("clado", "clado_block", "clado_diagonal", "mpqco", "hawq"),
    ),
    bits=(4, 8),
    wide_bits=(2, 3, 4, 6, 8),
    averages=(4.0, 5.0, 6.0, 7.0),
    # CLADO's own experiment: shares of the size with 8-bit weights.
    clado_bits=(2, 4, 8),
    sizes=(0.3125, 0.375, 0.4375, 0.5, 0.75),
    # 8 bits and float: shares of the MACs in 8 bits.
    int8_shares=(0.25, 0.5, 0.75, 1.0),
    random_plans=2,
    # Calibration images that CLADO, MPQCO and HAWQ-v3 measure on, 0: all.
    images=0,
    # CLADO: cross_entropy or kl; images in one forward pass; losses below the float model's as 0.
    loss="cross_entropy",
    block=64,
    clip=False,
    # HAWQ-v3: random vectors of the trace.
    probes=32,
    # Seconds for one integer program.
    time_limit=60.0,
    # Methods that train: what is done to training images, and each one's own settings.
    augmentation="crop_flip",
    **{name: settings(METHODS[name].Settings()) for name in TRAINED},
  )
  if small:
    config.table.seeds = (0,)
    config.comparison.update(
      tables=("main", "clado_tensor", "float8"),
      averages=(5.0, 6.0),
      sizes=(0.5,),
      int8_shares=(0.5, 1.0),
      random_plans=2,
      block=16,
      probes=2,
      time_limit=5.0,
    )
    config.comparison.ptmq.update(steps=2, batch_size=8)
    for name in ("robustquant", "anyprecision"):
      config.comparison[name].update(steps=2, every=1, batch_size=8)
    config.calibration.update(images=16, batch_size=16)
  return config


def of_other(name: str, of: str, small: bool) -> config_dict.ConfigDict:
  """An experiment with the model of another config.

  Args:
    name: of the experiment.
    of: the other config's name.
    small: its variant `runlocal`.
  """
  try:
    config = importlib.import_module(f"configs.{of}").get_config("runlocal" if small else None)
  except ModuleNotFoundError:
    raise ValueError(f"config argument of={of!r}: there is no configs/{of}.py") from None
  config.experiment = name
  config.name = f"{name}_{of}" + ("_runlocal" if small else "")
  return config


def serving(name: str, of: str, small: bool) -> config_dict.ConfigDict:
  """A serving experiment; arguments as of `of_other`."""
  config = of_other(name, of, small)
  config.serving = config_dict.create(
    # Latencies: a profile's file; `measure` times the artifact's model here, `repeats` batches at
    # each size and ratio; "" models them: INT8 runs `int8` requests a second in its largest
    # batches, `fixed` seconds of each batch are not its examples', 100 % runs `gain` times as fast.
    profile="",
    artifact="",
    repeats=20,
    int8=1250.0,
    gain=1.43,
    fixed=0.004,
    sizes=(1, 2, 4, 8, 16, 32, 64, 128),
    # Accuracy: the workdir of a finished run, and which of its methods.
    accuracy="",
    method="flexiq_distilled",
    # Largest batch, seconds that a batch waits for company, requests that wait at most, seconds
    # within which a request is to be answered.
    size=128,
    delay=0.1,
    queue=4096,
    target=0.3,
  )
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
