"""Latency of one batch by size and 4-bit ratio: what batching, controllers and simulator plan with.

A profile says where its numbers are from, so that no plan rests on numbers of an unknown device
(`profile_files` keeps it on disk):

| source          | what it means                                                            |
| --------------- | ------------------------------------------------------------------------ |
| `measured`      | a deployed model was timed on the device that wrote the file             |
| `device script` | the same, by `make device`, which runs on rented accelerators            |
| `estimated`     | computed; `note` says how, and begins with `modelled` for a mere gain    |

Between its points a profile is read so:

- sizes: a batch of n examples takes as long as the next size of the profile, since `Runner` pads
  it to that. A step, no line.
- ratios: linear between neighbours.

| symbol    | meaning                                              |
| --------- | ---------------------------------------------------- |
| L(n, ρ)   | seconds of a batch of n examples at ratio ρ          |
| T(ρ)      | throughput, max over n of n / L(n, ρ), examples a second |
"""

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SOURCES = ("measured", "estimated", "device script")
# Share of the time that 100 % saves, by ratio. The paper's abstract: 50 % has 40 % of the speed-up
# of 100 %. That this is of the time saved, and the lines to 0 and 1, are our reading.
SAVED = ((0.0, 0.5, 1.0), (0.0, 0.4, 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
  """Latencies of one model on one device.

  Attributes:
    sizes: S batch sizes, ascending.
    ratios: R 4-bit ratios in 0..1, ascending.
    p50, p99: float64 `[S, R]`, seconds of one batch.
    source: one of `SOURCES`.
    device: kind of the device.
    model: what was run.
    versions: name -> version of what ran it.
    date: ISO 8601, UTC.
    note: how the numbers came about, where `source` does not say it all.
  """

  sizes: tuple[int, ...]
  ratios: tuple[float, ...]
  p50: np.ndarray
  p99: np.ndarray
  source: str
  device: str
  model: str = ""
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  date: str = ""
  note: str = ""

  def __post_init__(self) -> None:
    """Checks all fields; raises ValueError with the name of the first that is wrong."""
    sizes, ratios = self.sizes, self.ratios
    if not sizes or any(type(n) is not int or n < 1 for n in sizes) or list(sizes) != _rise(sizes):
      raise ValueError(f"sizes: {sizes}; ascending positive integers are accepted")
    fine = all(isinstance(r, int | float) and 0 <= r <= 1 for r in ratios)
    if not ratios or not fine or list(ratios) != _rise(ratios):
      raise ValueError(f"ratios: {ratios}; ascending numbers in 0..1 are accepted")
    shape = (len(sizes), len(ratios))
    for name in ("p50", "p99"):
      try:
        values = np.array(getattr(self, name), np.float64)
      except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: no table of numbers ({error})") from None
      if values.shape != shape or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
          f"{name}: shape {values.shape}, smallest {np.min(values, initial=math.inf):g}; "
          f"{shape[0]} sizes x {shape[1]} ratios of positive seconds are accepted"
        )
      values.setflags(write=False)
      object.__setattr__(self, name, values)
    if (self.p99 < self.p50).any():
      raise ValueError("p99: below p50 somewhere; no smaller than p50 is accepted")
    if self.source not in SOURCES:
      raise ValueError(f"source: {self.source!r}; one of {', '.join(SOURCES)} is accepted")
    if not self.device:
      raise ValueError("device: empty; the kind of the device is accepted")

  def latencies(self, ratio: float, largest: int | None = None, *, p99: bool = False) -> np.ndarray:
    """Seconds of a batch of 0 to `largest` examples at a ratio.

    Args:
      ratio: within the profile's.
      largest: at most the profile's largest size, which None stands for.
      p99: the 99th percentile instead of the median.

    Returns:
      float64 `[largest + 1]`; 0 for no examples.

    Raises:
      ValueError: a ratio or a size that the profile does not cover.
    """
    largest = self.sizes[-1] if largest is None else largest
    if not 1 <= largest <= self.sizes[-1]:
      raise ValueError(f"largest: {largest}; the profile covers 1..{self.sizes[-1]}")
    if not self.ratios[0] <= ratio <= self.ratios[-1]:
      raise ValueError(
        f"ratio: {ratio}; the profile covers {self.ratios[0]:g}..{self.ratios[-1]:g}"
      )
    by_size = np.array(
      [np.interp(ratio, self.ratios, row) for row in (self.p99 if p99 else self.p50)]
    )
    next_size = np.searchsorted(self.sizes, np.arange(1, largest + 1))
    return np.concatenate([[0.0], by_size[next_size]])

  def throughput(self, ratio: float, largest: int | None = None, within: float = math.inf) -> float:
    """Most examples a second at a ratio, back to back.

    Args:
      ratio: within the profile's.
      largest: of batches; None is the profile's largest size.
      within: seconds that a batch may take. Where none is so fast, that of one example counts.
    """
    seconds = self.latencies(ratio, largest)[1:]
    rates = np.arange(1, len(seconds) + 1) / seconds
    fine = seconds <= within
    return float(rates[fine].max()) if fine.any() else float(rates[0])

  @property
  def gain(self) -> float:
    """Throughput at the highest ratio over that at the lowest."""
    return self.throughput(self.ratios[-1]) / self.throughput(self.ratios[0])

  def describe(self) -> str:
    """One line: where the numbers are from, and what the highest ratio gains."""
    parts = [f"{self.source}, {self.device}", self.model, self.date[:10], self.note]
    gain = f"{100 * self.ratios[-1]:g} % runs {self.gain:.2f}x the examples of "
    gain += f"{100 * self.ratios[0]:g} %"
    return "; ".join([*filter(None, parts), gain])


def modelled(
  *,
  int8: float,
  gain: float = 1.43,
  fixed: float = 0.004,
  sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
  ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> Profile:
  """A profile of no device: a line over sizes, and one gain at 100 %.

  `L(n, ρ) = (fixed + n b) (1 - s(ρ) (1 - 1 / gain))`, with b such that the largest batch runs
  `int8` examples a second at 0 %, and s from `SAVED`. No jitter is modelled: p99 is p50.

  Args:
    int8: examples a second at ratio 0.
    gain: throughput of 100 % over 0 %. 1.43 is what the paper is said to report for its kernel
      against 8-bit kernels; that whole models and all batch sizes gain as much is an assumption.
    fixed: seconds of a batch apart from its examples, at ratio 0.
    sizes: batch sizes.
    ratios: 4-bit ratios.

  Raises:
    ValueError: a gain below 1, or a rate that the fixed part does not allow.
  """
  largest = max(sizes)
  each = 1 / int8 - fixed / largest if int8 > 0 else 0.0
  if not (gain >= 1 and fixed >= 0 and each > 0):
    raise ValueError(
      f"int8: {int8} examples a second with gain {gain} and {fixed} s fixed; a positive rate below "
      f"{largest / fixed if fixed > 0 else math.inf:g}, a gain of at least 1 and fixed >= 0 are "
      "accepted"
    )
  saved = np.interp(ratios, *SAVED) * (1 - 1 / gain)
  seconds = np.outer(fixed + each * np.asarray(sizes), 1 - saved)
  return Profile(
    sizes=tuple(sizes),
    ratios=tuple(ratios),
    p50=seconds,
    p99=seconds,
    source="estimated",
    device="none",
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    note=f"modelled: 100 % is {gain:g}x of 0 %, 50 % saves 40 % of the time that 100 % saves",
  )


def _rise(values: Sequence[Any]) -> list[Any]:
  return sorted(set(values))
