"""Measured tiles: what `tuning.autotune` found for a kind of device, kept as `FOLDER/DEVICE.json`.

A product whose shape has an entry takes its tiles. Every other product takes tiles by rule, and so
does a convolution whose window slides. A file belongs to one kind of device; its tiles may not even
fit on others.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flexiq_jax.kernels import gpu, tpu
from flexiq_jax.kernels.operands import Activations, Weights

VERSION = 1
SHIPPED = Path(__file__).parent / "tiles"  # files that come with the project
Tiles = gpu.Tiles | tpu.Tiles

# Device kinds as JAX names them -> kernel. The first pattern found in the name rules.
# TPUs before v5 have no int8 products.
DEVICES: tuple[tuple[str, str], ...] = (
  (r"TPU v5", "tpu"),  # "TPU v5 lite" is a v5e, "TPU v5" and "TPU v5p" are v5p
  (r"TPU v6", "tpu"),
  (r"TPU ?v?7", "tpu"),
  (r"H100|H200|H800|GH200", "gpu"),
)
_CLASSES = {"tpu": tpu.Tiles, "gpu": gpu.Tiles}


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Shape:
  """What tiles are chosen for.

  Attributes:
    m, k, n: rows of x, rows of w, outputs.
    block: rows of K in a shift block.
  """

  m: int
  k: int
  n: int
  block: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is not int or value < 1:
        raise ValueError(f"shape.{field.name}: {value!r}; a positive integer is accepted")
    if self.k % self.block:
      raise ValueError(f"shape.block: {self.block}; a divisor of k = {self.k} is accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
  """The fastest tiles of a shape, and what they gain.

  Attributes:
    tiles: block sizes.
    seconds: median time of the product.
    heuristic_seconds: the same with the heuristic's tiles, measured beside it; None where those did
      not run.
  """

  tiles: Tiles
  seconds: float
  heuristic_seconds: float | None


def implementation(kind: str) -> str:
  """The kernel for a kind of device: tpu, gpu, or reference (which has no tiles)."""
  for pattern, name in DEVICES:
    if re.search(pattern, kind):
      return name
  return "reference"


def present() -> str:
  """The kind of the present device."""
  return jax.devices()[0].device_kind


def file_of(folder: str | os.PathLike[str], kind: str) -> Path:
  """Where the results of a device kind lie."""
  return Path(folder) / (re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json")


def load(folder: str | os.PathLike[str], kind: str) -> dict[Shape, Tuned]:
  """What was tuned for a device kind; nothing where there is no file.

  Raises:
    ValueError: a file that is damaged, of another version or of another device, naming it.
  """
  path = file_of(folder, kind)
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    version, device = content["version"], content["device"]
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: no file of tuned tiles ({error!r}); delete it and tune") from error
  if version != VERSION:
    raise ValueError(f"{path}: version {version!r}; {VERSION} is accepted, tune again")
  if device != kind:
    raise ValueError(f"{path}: tuned on {device!r}, this is for {kind!r}")
  try:
    return dict(_decode(entry, kind) for entry in content["tuned"])
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: an entry cannot be read: {error}") from error


def read(folder: str | os.PathLike[str], kind: str | None = None) -> dict[Shape, Tiles]:
  """Tiles that products are to take, for `api.mixed_matmul`.

  Args:
    folder: where the files lie.
    kind: device kind; None is the present device.

  Raises:
    ValueError: there is no file of this device, or it cannot be read.
  """
  kind = kind or present()
  if implementation(kind) == "reference":
    raise ValueError(
      f"tuning: {str(folder)!r}, but device {kind!r} runs the reference, which has no tiles; name "
      "no folder"
    )
  path = file_of(folder, kind)
  if not path.is_file():
    there = ", ".join(sorted(p.name for p in Path(folder).glob("*.json"))) or "no file"
    raise ValueError(
      f"tuning: {path} does not exist, which holds the tiles of {kind!r}; in the folder: {there}. "
      "Measure them (kernels.tuning.autotune), or name no folder: tiles then follow a rule"
    )
  return {shape: found.tiles for shape, found in load(folder, kind).items()}


def shipped(kind: str | None = None) -> dict[Shape, Tiles]:
  """Tiles that come with the project for a kind of device; nothing where none were measured.

  Args:
    kind: device kind; None is the present device.

  Raises:
    ValueError: the project's file cannot be read.
  """
  kind = kind or present()
  if implementation(kind) == "reference":
    return {}
  return {shape: found.tiles for shape, found in load(SHIPPED, kind).items()}


def choose(tuned: Mapping[Shape, Tiles] | None, x: Activations, w: Any) -> Tiles | None:
  """The tiles of a product; None where none were measured.

  Args:
    tuned: of `read`.
    x: activations `[M, K]`.
    w: `Weights`, or what `gpu.prepare` made of them.
  """
  if not tuned:
    return None
  (m, k), n = x.x8.shape, w.w8.shape[1] if isinstance(w, Weights) else w.n
  return tuned.get(Shape(m=m, k=k, n=n, block=w.block))


def encode(kind: str, tuned: Mapping[Shape, Tuned]) -> str:
  """The text of a file."""
  entries = [
    {"shape": dataclasses.asdict(shape), **dataclasses.asdict(tuned[shape])}
    for shape in sorted(tuned)
  ]
  return json.dumps({"version": VERSION, "device": kind, "tuned": entries}, indent=2) + "\n"


def _decode(entry: Mapping[str, Any], kind: str) -> tuple[Shape, Tuned]:
  tiles = _CLASSES[implementation(kind)](**entry["tiles"])
  seconds, first = float(entry["seconds"]), entry["heuristic_seconds"]
  first = None if first is None else float(first)
  return Shape(**entry["shape"]), Tuned(tiles=tiles, seconds=seconds, heuristic_seconds=first)
