"""The profile of a device: latency of deployed models by batch and 4-bit ratio, for simulators.

    profile = profiles.read("build/device/profile.json")
    profile.latency("vit_b", batch=8, ratio=0.5)        # seconds, p50, host to host

A ratio or batch between measured ones is interpolated linearly; one beyond them is refused.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

VERSION = 1
FIELDS = ("batch", "ratio", "p50_us", "p99_us", "calls", "device_p50_us", "device_p99_us")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
  """Measured latencies of one device.

  Attributes:
    version: of this schema.
    device: kind, as JAX names it.
    platform: gpu, tpu or cpu.
    made: `measured`, always.
    date: YYYY-MM-DD.
    how: what was measured, in words.
    versions: of what computed it.
    tiles: of the kernels: `by rule` or `measured`.
    models: model name -> `latency` (rows of `FIELDS`; further fields are kept), `switch_us` (p50,
      p99) and `memory` (bytes).
  """

  version: int
  device: str
  platform: str
  made: str
  date: str
  how: str
  versions: dict[str, Any]
  tiles: str
  models: dict[str, dict[str, Any]]

  def __post_init__(self):
    for field, value in (("version", VERSION), ("made", "measured")):
      if getattr(self, field) != value:
        raise ValueError(f"profile.{field}: {getattr(self, field)!r}; {value!r} is accepted")
    for name, model in self.models.items():
      for row in model["latency"]:
        for field in FIELDS:
          found = row.get(field)
          number = isinstance(found, int | float) and math.isfinite(found) and found >= 0
          if not number:
            where = f"profile.models.{name}.latency.{field}"
            raise ValueError(f"{where}: {found!r}; a number from 0 on is accepted")

  def latency(self, model: str, *, batch: float, ratio: float, field: str = "p50_us") -> float:
    """Seconds of a batch at a ratio.

    Raises:
      ValueError: a model, batch or ratio that was not measured, or a grid with gaps.
    """
    if model not in self.models:
      raise ValueError(f"model: {model!r}; one of {', '.join(self.models)} is accepted")
    rows = {(r["batch"], r["ratio"]): r[field] for r in self.models[model]["latency"]}
    batches, ratios = (sorted({key[i] for key in rows}) for i in range(2))
    for name, value, there in (("batch", batch, batches), ("ratio", ratio, ratios)):
      if not there[0] <= value <= there[-1]:
        raise ValueError(f"{name}: {value}; {there[0]}..{there[-1]} was measured")
    if gaps := [(b, r) for b in batches for r in ratios if (b, r) not in rows]:
      raise ValueError(f"profile of {model}: (batch, ratio) {gaps[0]} was not measured")
    at = [np.interp(ratio, ratios, [rows[b, r] for r in ratios]) for b in batches]
    return 1e-6 * float(np.interp(batch, batches, at))


def to_dict(profile: Profile) -> dict[str, Any]:
  """As JSON holds it."""
  return dataclasses.asdict(profile)


def read(path: str | pathlib.Path) -> Profile:
  """Reads and checks a profile.

  Raises:
    ValueError: not a profile; names the file and the field.
  """
  path = pathlib.Path(path)
  try:
    return Profile(**json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: not a profile: {error!r}") from error
