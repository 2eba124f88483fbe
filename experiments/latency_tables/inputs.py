"""What latency tables are made of: devices, and rows from files that a config names."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from experiments.shared import served, setup, works
from experiments.shared.checks import field
from flexiq_jax import serving
from flexiq_jax.runs import files, schemas
from flexiq_jax.serving import latency, npu, profile_files

NPU = "npu"
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a schedule's estimates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A row from a file.

  Attributes:
    method, ratio: its key.
    values: columns.
  """

  method: str
  ratio: float
  values: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """A config, checked, with what it reads.

  Attributes:
    config: the config.
    described: its model.
    devices: name -> device.
    rows: of the files that it names.
    notes: which files these are, for the report.
  """

  config: Any
  described: setup.Described
  devices: Mapping[str, latency.Device | npu.Array]
  rows: tuple[Row, ...]
  notes: tuple[str, ...]


def method(model: str, device: str, batch: int, source: str) -> str:
  """A row's method."""
  return f"{model} on {device}, batch {batch}, {source}"


def prepare(config) -> Inputs:
  """Checks a config and reads its files.

  Raises:
    ValueError, FileNotFoundError: names the field.
  """
  check(config)
  part, rows, notes = config.latency, [], []
  for path in part.profiles:
    with field("config.latency.profiles"):
      for found in profile_files.read_all(os.path.expandvars(path)).values():
        rows += of_profile(found, config)
        notes.append(f"`{path}`: {found.describe()}.")
  if part.schedules:
    with field("config.latency.schedules"):
      rows += of_schedules(Path(os.path.expandvars(part.schedules)))
    notes.append(f"`{part.schedules}`: schedules, estimated by `benchmarks/kernels.py`.")
  known: dict[str, latency.Device | npu.Array] = dict(latency.DEVICES)
  known[NPU] = npu.Array(**part.array)
  return Inputs(
    config=config,
    described=setup.describe(config),
    devices={name: known[name] for name in part.devices},
    rows=tuple(rows),
    notes=tuple(notes),
  )


def check(config) -> None:
  """Raises ValueError where a field is missing or out of range."""
  works.check(config, "latency")
  part = config.latency
  known = (*latency.DEVICES, NPU)
  for name in part.devices:
    if name not in known:
      raise ValueError(f"config.latency.devices: {name!r} is not one of {', '.join(known)}")
  if not part.devices:
    raise ValueError("config.latency.devices: empty; name at least one")
  with field("config.latency.array", part.array):
    npu.Array(**part.array)
  if part.artifact:
    served.require_artifact("config.latency.artifact", part.artifact)
  if type(part.repeats) is not int or part.repeats < 2:
    raise ValueError(f"config.latency.repeats: {part.repeats!r}; 2 or more is accepted")


def of_profile(profile: serving.Profile, config) -> list[Row]:
  """Rows of a profile, at the config's ratios and batches as far as it covers them."""
  rows = []
  ends = profile.ratios[0], profile.ratios[-1]
  ratios = [ratio for ratio in config.ratios if ends[0] <= ratio <= ends[1]]
  for batch in config.latency.batches:
    if batch > profile.sizes[-1]:
      continue
    model = profile.model.replace(" on ", "_on_") or "a model"  # tables look for ` on `
    name = method(model, profile.device, batch, profile.source)
    seconds = {ratio: float(profile.latencies(ratio, batch)[batch]) for ratio in ratios}
    for ratio in ratios:
      values = {"seconds": seconds[ratio]}
      if 0.0 in seconds:
        values["gain"] = seconds[0.0] / seconds[ratio]
      rows.append(Row(method=name, ratio=ratio, values=values))
  if not rows:
    raise ValueError(
      f"a profile of batches up to {profile.sizes[-1]} and ratios {ends[0]:g}..{ends[1]:g}, which "
      f"has none of config.latency.batches, {tuple(config.latency.batches)}, or of config.ratios"
    )
  return rows


_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Level(msgspec.Struct):
  seconds: _Positive
  bound_by_compute: Annotated[float, msgspec.Meta(ge=0, le=1)]
  weight_bytes: float
  bytes: float


class _Estimate(msgspec.Struct):
  model: str
  chip: str
  batch: Annotated[int, msgspec.Meta(ge=1)]
  levels: Annotated[tuple[_Level, ...], msgspec.Meta(min_length=5, max_length=5)]


class _Schedules(msgspec.Struct):
  estimates: Annotated[tuple[_Estimate, ...], msgspec.Meta(min_length=1)]


def of_schedules(path: Path) -> list[Row]:
  """Rows of what `benchmarks/kernels.py --json` wrote: the products of models on TPUs.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds no estimates; names the field.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"{str(path)!r}: no such file; `benchmarks/kernels.py --json` writes one"
    )
  found = files.read_json(path)
  try:
    estimates = schemas.convert(found, _Schedules).estimates
  except ValueError as error:
    raise ValueError(f"{str(path)!r}: {error}") from None
  rows = []
  for one in estimates:
    for ratio, level in zip(_LEVELS, one.levels, strict=True):
      if not math.isfinite(level.seconds):
        raise ValueError(
          f"{str(path)!r}: seconds of {one.model}: {level.seconds}; a finite number is needed"
        )
      rows.append(
        Row(
          method=method(one.model, one.chip, one.batch, "schedule"),
          ratio=ratio,
          values={
            "seconds": level.seconds,
            "gain": one.levels[0].seconds / level.seconds,
            "bound_by_compute": level.bound_by_compute,
            "weight_bytes": level.weight_bytes,
            "activation_bytes": level.bytes - level.weight_bytes,
          },
        )
      )
  return rows
