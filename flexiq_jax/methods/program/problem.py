"""Which bit width for which layer: the problem and its answer.

    min  x' G x  or  c . x     x one-hot in each layer,  cost . x <= limit  for each limit

Every layer-wise method ends in such a program; they differ in how they measure G or c. solvers.py
solves them.

| symbol | meaning |
|---|---|
| I | layers |
| n | options: the bit widths of all layers, those of one layer side by side |
| x | bool `[n]`, the options taken |
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

import numpy as np

_PROVEN = 1e-6  # largest gap that counts as none: what the solvers' tolerances leave


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
  """What may be chosen, and what it costs.

  Attributes:
    names: layer names, all different.
    bits: for each layer its bit widths, all different; the order is that of the options.
    costs: name of a cost (size, BitOPs, latency, ...) -> float64 `[n]`, in any unit.
    tied: sets of layers that must have the same bit width; a layer is in one set at most.

  Raises:
    ValueError: fields that do not fit together, and ties that leave a layer no bit width.
  """

  names: tuple[str, ...]
  bits: tuple[tuple[int, ...], ...]
  costs: Mapping[str, np.ndarray]
  tied: tuple[tuple[str, ...], ...] = ()

  @classmethod
  def create(
    cls,
    names: Sequence[str],
    bits: Sequence[int] | Sequence[Sequence[int]],
    costs: Mapping[str, Sequence[Sequence[float]] | np.ndarray],
    *,
    tied: Sequence[Sequence[str]] = (),
  ) -> "Choices":
    """Builds choices from values per layer.

    Args:
      names: layer names.
      bits: bit widths, the same for all layers or a sequence for each.
      costs: cost name -> for each layer the cost of each of its bit widths.
      tied: as the attribute.
    """
    common = [b for b in bits if isinstance(b, numbers.Integral)]
    per_layer = [common] * len(names) if len(common) == len(bits) else bits
    widths = tuple(tuple(layer) for layer in per_layer)  # pyrefly: ignore[bad-argument-type]
    for cost, values in costs.items():
      found = [len(v) for v in values]
      if found != [len(w) for w in widths]:
        raise ValueError(f"costs[{cost!r}]: {found} values per layer for bits {widths}")
    flat = {cost: np.concatenate([np.empty(0), *values]) for cost, values in costs.items()}
    sets = tuple(tuple(layers) for layers in tied)
    return cls(names=tuple(names), bits=widths, costs=flat, tied=sets)

  def __post_init__(self):
    if not self.names or len(set(self.names)) < len(self.names):
      raise ValueError(f"names: {self.names}; expected at least one layer, names all different")
    if len(self.bits) != len(self.names):
      raise ValueError(f"bits: of {len(self.bits)} layers; expected {len(self.names)}")
    for name, widths in zip(self.names, self.bits, strict=True):
      fine = all(isinstance(b, numbers.Integral) and b >= 1 for b in widths)
      if not widths or not fine or len(set(widths)) < len(widths):
        raise ValueError(f"bits: {widths} for layer {name}; expected different whole numbers >= 1")
    for cost, values in self.costs.items():
      _check(f"costs[{cost!r}]", values, (self.total,))
    several = [name for layers in self.tied for name in layers]
    if unknown := [name for name in several if name not in self.names]:
      raise ValueError(f"tied: no layer {unknown[0]!r}; there are {self.names}")
    if len(set(several)) < len(several):
      raise ValueError(f"tied: {self.tied}; expected each layer once at most")
    for layers, widths in self.groups():
      if not widths:
        tied = [self.names[i] for i in layers]
        raise ValueError(f"tied: layers {tied} have no bit width that all of them may take")

  @property
  def total(self) -> int:
    """n, the number of options."""
    return sum(len(widths) for widths in self.bits)

  @property
  def layer(self) -> np.ndarray:
    """Number of the layer of each option, int `[n]`."""
    return np.repeat(np.arange(len(self.names)), [len(widths) for widths in self.bits])

  def groups(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(numbers of layers that decide together, bit widths that all of them may take)."""
    index = {name: i for i, name in enumerate(self.names)}
    sets = [sorted(index[name] for name in layers) for layers in self.tied if layers]
    free = set(range(len(self.names))).difference(*sets)
    groups = sorted([*sets, *([i] for i in free)])
    return [
      (tuple(g), tuple(w for w in self.bits[g[0]] if all(w in self.bits[i] for i in g)))
      for g in groups
    ]

  def pick(self, bits: Mapping[str, int]) -> np.ndarray:
    """Bits per layer -> x, bool `[n]`. Does not look at `tied`.

    Raises:
      ValueError: other layers than these, or a bit width that the layer does not have.
    """
    if set(bits) != set(self.names):
      raise ValueError(f"bits: of layers {sorted(bits)}; expected {sorted(self.names)}")
    for name, widths in zip(self.names, self.bits, strict=True):
      if bits[name] not in widths:
        raise ValueError(f"bits: {bits[name]} for layer {name}, which has {widths}")
    return np.array(
      [bits[n] == b for n, widths in zip(self.names, self.bits, strict=True) for b in widths]
    )

  def uniform(self, which=max) -> dict[str, int]:
    """Each layer's highest (`max`) or lowest (`min`) bit width that ties allow."""
    return {self.names[i]: which(widths) for layers, widths in self.groups() for i in layers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is minimised.

  Attributes:
    choices: the options.
    objective: float64; `[n, n]`, symmetric, for x' G x, or `[n]` for c . x.
    limits: cost name -> the most that the options taken may cost together.

  Raises:
    ValueError: wrong shapes, numbers that are not finite, an objective that is not symmetric (up to
      float32's rounding), a limit on an unknown cost.
  """

  choices: Choices
  objective: np.ndarray
  limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    n = self.choices.total
    _check("objective", self.objective, (n,) if np.ndim(self.objective) == 1 else (n, n))
    if np.ndim(self.objective) == 2:
      skew = np.abs(self.objective - self.objective.T).max()
      if skew > 1e-4 * np.abs(self.objective).max():
        raise ValueError(f"objective: differs from its transpose by {skew}; expected a symmetric G")
    for name, limit in self.limits.items():
      if name not in self.choices.costs:
        raise ValueError(f"limits: no cost {name!r}; there are {tuple(self.choices.costs)}")
      if not np.isfinite(limit):
        raise ValueError(f"limits: {limit} for {name}; expected a finite number")

  def value(self, bits: Mapping[str, int]) -> float:
    """The objective of any choice of bits."""
    x = self.choices.pick(bits).astype(np.float64)
    return float(x @ self.objective @ x if np.ndim(self.objective) == 2 else self.objective @ x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
  """An answer.

  Attributes:
    bits: layer name -> bit width.
    objective: its value.
    bound: no allowed choice has a lower objective; None where nothing was proven.
    costs: name -> total, of all costs, limited or not.
    seconds: wall time that the solver took.
    solver: its name.
  """

  bits: dict[str, int]
  objective: float
  bound: float | None
  costs: dict[str, float]
  seconds: float
  solver: str

  @property
  def gap(self) -> float | None:
    """How far the objective may be above the least, in units of its size; None without a bound."""
    if self.bound is None:
      return None
    size = max(abs(self.objective), abs(self.bound), float(np.finfo(np.float64).tiny))
    return (self.objective - self.bound) / size

  @property
  def optimal(self) -> bool:
    """Whether no allowed choice is better: the gap is within the solvers' tolerance."""
    return self.gap is not None and self.gap <= _PROVEN


def _check(field: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
  if np.shape(values) != shape:
    raise ValueError(f"{field}: shape {np.shape(values)}, expected {shape}")
  if not np.isfinite(values).all():
    raise ValueError(f"{field}: {int((~np.isfinite(values)).sum())} numbers are not finite")
