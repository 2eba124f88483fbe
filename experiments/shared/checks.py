"""The values of a config, checked before work starts.

Functions of the package take plain arguments and name those in their errors; `field` puts the
config's field in front, so that a message says where to change what.
"""

import ast
import contextlib
import dataclasses
import re
from collections.abc import Container, Iterator
from typing import Any

from flexiq_jax import data, models
from flexiq_jax.finetuning import ImageSettings, ReconstructionSettings
from flexiq_jax.quant import LowSettings, RangeSettings
from flexiq_jax.runs import files
from flexiq_jax.search import METHODS, SearchSettings
from flexiq_jax.training import TrainSettings

_TOP = (
  *("experiment", "name", "seed", "model", "model_args", "dtype", "weights", "recipe", "train"),
  *("batch_size", "preprocess", "ranges", "groups", "dynamic", "score", "ratios", "random_seeds"),
  *("variants", "keep8", "keep_first_last", "select_depthwise", "search", "compare"),
  *("other_weights", "tune", "tune_int4", "reconstruct", "distill", "finetune", "teacher"),
)
TUNING: dict[str, type[Any]] = {
  "reconstruct": ReconstructionSettings,
  "distill": ImageSettings,
  "finetune": ImageSettings,
}
_MOST = 2**31 - 1  # largest number of images, and seed
_FIELDS = {  # section -> what a config has to have there
  "": _TOP,
  "data": ("name", "root", "split", "limit"),
  "calibration": ("name", "root", "split", "images", "batch_size"),
  "teacher": ("model", "model_args", "weights"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A config's values, checked.

  Attributes:
    model_args: overrides of the model's arguments.
    preprocess: of the images.
    ranges, groups: of quantization.
    train: of training from scratch.
    search: of the order.
    ratios: 4-bit ratios, ascending.
    tuning: way of finetuning -> its settings, of those that are asked for.
    reconstruction: what finetuning begins with, where its settings say so.
  """

  model_args: dict[str, Any]
  preprocess: data.Preprocess
  ranges: RangeSettings
  groups: LowSettings
  train: TrainSettings
  search: SearchSettings
  ratios: tuple[float, ...]
  tuning: dict[str, Any]
  reconstruction: ReconstructionSettings


def check(config) -> Settings:
  """Reads and checks all values of a config that need neither weights nor data."""
  for section, names in _FIELDS.items():
    part = config.get(section, {}) if section else config
    if missing := [name for name in names if name not in part]:
      name = ".".join(filter(None, ("config", section, missing[0])))
      raise ValueError(f"{name}: missing; configs/common.py has all fields")
  if not re.fullmatch(r"\w[\w.-]*", config.name):
    raise ValueError(
      f"config.name: {config.name!r} names a folder below runs/; letters, digits, _, - and . are "
      "accepted"
    )
  if not is_seed(config.seed):
    raise ValueError(f"config.seed: {config.seed} is not in 0..{_MOST}")
  if config.dtype not in models.registry.DTYPES:
    raise ValueError(
      f"config.dtype: {config.dtype!r} is not one of {', '.join(models.registry.DTYPES)}"
    )
  with field("config.model"):
    spec = models.get(config.model)
  with field("config.model_args"):
    args = model_args(config.model_args, spec)
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
  with field("config.search", config.search):
    search = SearchSettings(**config.search)
  for method in config.compare:
    if method not in METHODS:
      raise ValueError(f"config.compare: {method!r} is not one of {', '.join(METHODS)}")
  if config.score not in ("exact", "range"):
    raise ValueError(f"config.score: {config.score!r} is not one of exact, range")
  for name in ("batch_size", "calibration.batch_size", "calibration.images"):
    value = config
    for part in name.split("."):
      value = value[part]
    if value < 1:
      raise ValueError(f"config.{name}: {value} is not a positive number")
    if value > _MOST:
      raise ValueError(f"config.{name}: {value}; 1..{_MOST} is accepted")
  if config.data.limit < 0:
    raise ValueError(f"config.data.limit: {config.data.limit} is negative; 0 takes all images")
  if config.data.limit > _MOST:
    raise ValueError(f"config.data.limit: {config.data.limit}; 0..{_MOST} is accepted")
  return Settings(
    model_args=args,
    preprocess=preprocess,
    ranges=ranges,
    groups=groups,
    train=train,
    search=search,
    ratios=_ratios(config.ratios),
    tuning=_tuning(config),
    reconstruction=_reconstruction(config),
  )


def is_seed(value: Any) -> bool:
  """Whether a value is an integer that seeds accept."""
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def require(config, section: str, file: str) -> None:
  """Refuses a config without the section that its experiment reads.

  Args:
    config: the config.
    section: the field.
    file: a config that has it.

  Raises:
    ValueError: the section is missing.
  """
  if section not in config:
    raise ValueError(
      f"config.experiment: {config.experiment!r} reads config.{section}, which this config lacks; "
      f"take --config={file}"
    )


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
    if text.startswith("config.") or getattr(error, "errno", None) in files.FULL:
      raise  # no field makes a disk full
    first = re.match(r"(\w+)(: | is )", text)
    joint = "." if first and first[1] in known else ": "
    raise ValueError(f"{name}{joint}{text}") from error


def model_args(text: str, spec: models.ModelSpec) -> dict[str, Any]:
  """Arguments as a call of the model has them; `tiny`, before the others, is a small model."""

  def unreadable(part: str) -> ValueError:
    return ValueError(f"{part!r} is not name=value with a Python number, string or tuple")

  try:
    call = ast.parse(f"_({text})", mode="eval").body
  except (SyntaxError, ValueError):
    raise unreadable(text) from None
  if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
    raise unreadable(text)  # brackets that close the call early
  args: dict[str, Any] = {}
  for given in call.args:
    if ast.unparse(given) != "tiny":
      raise unreadable(ast.unparse(given))
    args |= spec.tiny
  for given in call.keywords:
    if given.arg is None:  # **
      raise unreadable(ast.unparse(given))
    try:
      args[given.arg] = ast.literal_eval(given.value)
    except ValueError:
      raise unreadable(ast.unparse(given)) from None
  return args


def _tuning(config) -> dict[str, Any]:
  found = {}
  for name in config.tune:
    if name not in TUNING:
      raise ValueError(f"config.tune: {name!r} is not one of {', '.join(TUNING)}")
    with field(f"config.{name}", config[name]):
      found[name] = TUNING[name](**config[name])
  if found and config.dynamic:
    raise ValueError("config.tune: finetuning needs static shifts; set config.dynamic=False")
  return found


def _reconstruction(config) -> ReconstructionSettings:
  with field("config.reconstruct", config.reconstruct):
    return ReconstructionSettings(**config.reconstruct)


def _ratios(ratios) -> tuple[float, ...]:
  for ratio in ratios:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
      raise ValueError(f"config.ratios: {ratio!r} is not a number in 0..1")
  if not ratios:
    raise ValueError("config.ratios: empty; give numbers in 0..1, as (0.0, 0.5, 1.0)")
  return tuple(sorted({float(ratio) for ratio in ratios}))
