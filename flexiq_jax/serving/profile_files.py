"""Profiles on disk: our own JSON, and what `make device` wrote on a machine with an accelerator.

Both are read by strict schemas. A file of `make device` holds several models; each is a profile.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from flexiq_jax.runs import files, schemas
from flexiq_jax.serving.profile import Profile

KIND = "latency profile"
VERSION = 1

# A table of all sizes up to the largest is made when a profile is used.
_Size = Annotated[int, msgspec.Meta(le=2**20)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class _Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """A profile's file: the types of its fields; `Profile` checks what they say together."""

  kind: str
  version: int
  sizes: tuple[_Size, ...]
  ratios: tuple[float, ...]
  p50: tuple[tuple[float, ...], ...]
  p99: tuple[tuple[float, ...], ...]
  source: str
  device: str
  model: str
  versions: dict[str, str]
  date: str
  note: str


class _Row(msgspec.Struct):
  """One batch size and ratio of a file of `make device`; what else it says is not read."""

  batch: _Size
  ratio: float
  p50_us: _Seconds
  p99_us: _Seconds


class _Measured(msgspec.Struct):
  """One model."""

  latency: Annotated[tuple[_Row, ...], msgspec.Meta(min_length=1)]


class _Device(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """A file of `make device` (benchmarks/device/profiles.py)."""

  version: Literal[1]
  device: str
  platform: str
  made: Literal["measured"]
  date: str
  how: str
  versions: dict[str, Any]
  tiles: str
  models: Annotated[dict[str, _Measured], msgspec.Meta(min_length=1)]


def write(path: str | os.PathLike[str], profile: Profile) -> Path:
  """Writes a profile as JSON, atomically."""
  record = {"kind": KIND, "version": VERSION} | {
    field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)
  }
  text = json.dumps(files.to_plain(record), indent=1, allow_nan=False)
  return files.write_text(path, text + "\n")


def read(path: str | os.PathLike[str], model: str = "") -> Profile:
  """Reads a profile.

  Args:
    path: its file.
    model: which one of a file of `make device`; "" takes the only one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no profile of this version; names the field, its value and what is accepted.
  """
  found = read_all(path)
  if len(found) == 1 and (not model or list(found) == [""]):
    return next(iter(found.values()))
  if model not in found:
    raise ValueError(
      f"profile {str(path)!r}: model: {model!r}; {', '.join(found)} are in this file"
    )
  return found[model]


def read_all(path: str | os.PathLike[str]) -> Mapping[str, Profile]:
  """Reads all profiles of a file by their models; that of our own format is called "".

  Raises:
    FileNotFoundError, ValueError: as `read`.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"profile {str(path)!r}: no such file")
  record = files.read_json(path)
  own = record.get("kind") == KIND and record.get("version") == VERSION
  if not own and "made" not in record:
    raise ValueError(
      f"profile {str(path)!r}: kind {record.get('kind')!r:.80}, version "
      f"{record.get('version')!r:.80}; {KIND!r} of version {VERSION} is accepted, or what "
      "`make device` wrote"
    )
  try:
    return _own(record) if own else _of_device(record)
  except ValueError as error:
    raise ValueError(f"profile {str(path)!r}: {error}") from None


def _own(record: Mapping[str, Any]) -> dict[str, Profile]:
  fields = msgspec.structs.asdict(schemas.convert(record, _Document))
  named = {name: value for name, value in fields.items() if name not in ("kind", "version")}
  return {"": Profile(**named)}


def _of_device(record: Mapping[str, Any]) -> dict[str, Profile]:
  """Each model of a file of `make device`; its times are from host to host."""
  read = schemas.convert(record, _Device)
  found = {}
  for name, measured in read.models.items():
    at = {(row.batch, row.ratio): row for row in measured.latency}
    sizes, ratios = (tuple(sorted({key[i] for key in at})) for i in range(2))
    if gaps := [(n, r) for n in sizes for r in ratios if (n, r) not in at]:
      raise ValueError(f"models.{name}: batch {gaps[0][0]} at ratio {gaps[0][1]:g} is not there")
    p50, p99 = (
      np.array([[1e-6 * getattr(at[n, r], field) for r in ratios] for n in sizes])
      for field in ("p50_us", "p99_us")
    )
    try:
      found[name] = Profile(
        **{"sizes": sizes, "ratios": ratios, "p50": p50, "p99": p99},
        source="device script",
        device=read.device,
        model=name,
        versions={key: str(value) for key, value in read.versions.items()},
        date=read.date,
        note=f"{read.how}; tiles {read.tiles}",
      )
    except ValueError as error:
      raise ValueError(f"models.{name}: {error}") from None
  return found
