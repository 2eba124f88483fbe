"""The tables of a comparison: which bits may be chosen, what limits them, what else is fixed.

| section | weights | activations | other layers | budget |
|---|---|---|---|---|
| `main` | 4, 8 | as the weights | 8 bits | average bits |
| `clado_tensor` | 2, 4, 8, one scale per layer | 8 | float | size |
| `clado_channel` | 2, 4, 8, a scale per output channel | 8 | float | size |
| `wide` | 2, 3, 4, 6, 8 | as the weights | 8 bits | average bits |
| `float8` | 8, float | as the weights | float | share in 8 bits |

Average bits are a mean over the MACs of the layers that may be lowered; size is the share of what
these layers take with 8-bit weights; the share in 8 bits is that of their MACs, at least. Limits of
size are CLADO's own experiment; 8 bits and float are what compilers offer, and QuantuneV2's other
pair.

A row's `ratio` in results.csv is its budget: (8 - average bits) / 4, which for FlexiQ is the 4-bit
ratio, or the size, or the share. Methods of other sections than `main` have its name in front.

In `float8` are the methods that can tell layers apart by what 8 bits do to them:

- QuantuneV2, MPQCO and HAWQ-v3 measure squares, of changes of outputs or logits and of errors of
  weights. However small, these are no noise.
- CLADO with the cross-entropy does not: on ResNet-20, 8 bits in one layer lower it about as often
  as they raise it, and what a pair of layers adds is as large and of either sign. Its diagonal is
  there with the divergence from the float model's prediction, which is never negative, whatever
  `loss` says; pairs, whose number grows with the square of the layers', are not.
- FlexiQ has no layers in floating point, and uniform bits no share.
"""

import dataclasses
import math
from typing import Any, Literal

from experiments.shared.checks import field
from flexiq_jax.methods.layerwise import FLOAT

LAYERWISE = ("random", "clado", "clado_block", "clado_diagonal", "mpqco", "hawq")
METHODS = ("flexiq_greedy", "flexiq", "uniform", "quantune", *LAYERWISE)
WITH_FLOAT = ("quantune", "random", "clado_diagonal", "mpqco", "hawq")
TOLERANCE = 0.05  # of average bits, and of the share in 8 bits

Budget = Literal["average bits", "size", "share in 8 bits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """One table.

  Attributes:
    name: see above.
    title: heading of the table.
    bits: widths of weights that may be chosen, ascending; `FLOAT` for floating point.
    activation_bits: width of the inputs of these layers, None: as the weights.
    per_channel: a weight scale for each output channel, not for each layer.
    kept: bits of all other layers.
    unit: what budgets are.
    budgets: average bits, or shares of the size or of the MACs.
    methods: what is compared, in this order.
    pairs: whether CLADO measures pairs of layers; without, only its diagonal is there.
    loss: what CLADO measures; None: what the config says.
  """

  name: str
  title: str
  bits: tuple[int, ...]
  activation_bits: int | None
  per_channel: bool
  kept: int
  unit: Budget
  budgets: tuple[float, ...]
  methods: tuple[str, ...]
  pairs: bool = True
  loss: str | None = None

  @property
  def widths(self) -> tuple[int, ...]:
    """The bits that are not floating point."""
    return tuple(b for b in self.bits if b != FLOAT)

  def ratio(self, budget: float) -> float:
    """The budget as it stands in results.csv."""
    return (8 - budget) / 4 if self.unit == "average bits" else budget

  def budget(self, ratio: float) -> float:
    """Inverse of `ratio`."""
    return 8 - 4 * ratio if self.unit == "average bits" else ratio

  def limit(self, budget: float) -> float:
    """The most that a plan may have: average bits, or size."""
    if self.unit == "share in 8 bits":
      return FLOAT - (FLOAT - 8) * budget
    return budget

  def missed(self, budget: float, average: float) -> bool:
    """Whether a plan's average bits are further from a budget than `TOLERANCE`."""
    off = abs(average - self.limit(budget))
    if self.unit == "share in 8 bits":
      off /= FLOAT - 8
    return self.unit != "size" and off > TOLERANCE

  def label(self, method: str) -> str:
    """The method as it stands in results.csv."""
    return method if self.name == "main" else f"{self.name}/{method}"


def of(config) -> tuple[Section, ...]:
  """The sections that a config asks for.

  Raises:
    ValueError: a value is wrong; names the field.
  """
  part = config.comparison
  chosen = _known("methods", part.methods, METHODS)
  for seed in part.seeds:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
      raise ValueError(f"config.comparison.seeds: {seed!r} is not in 0..{2**31 - 1}")
  if not part.seeds:
    raise ValueError("config.comparison.seeds: empty; give at least one")
  layerwise = tuple(m for m in chosen if m in LAYERWISE)
  main, wide, clado = (_bits(name, part[name]) for name in ("bits", "wide_bits", "clado_bits"))
  averages = _budgets("averages", part.averages, 4.0, 8.0)
  sizes = _budgets("sizes", part.sizes, min(clado) / 8, 1.0)
  shares = _budgets("int8_shares", part.int8_shares, 0.0, 1.0)
  # Two precisions, one for each end of its list: QuantuneV2 has no third.
  two = tuple(m for m in chosen if m != "quantune" or len(main) == 2)
  size: dict[str, Any] = {
    "kept": FLOAT,
    "activation_bits": 8,
    "bits": clado,
    "unit": "size",
    "budgets": sizes,
  }
  same: dict[str, Any] = {"activation_bits": None, "per_channel": True}
  average: dict[str, Any] = {"kept": 8, "unit": "average bits", "budgets": averages, **same}
  made = {
    "main": Section(name="main", title=_title(main), bits=main, methods=two, **average),
    "clado_tensor": Section(
      name="clado_tensor",
      title=f"{_title(clado)} weights with a scale per layer, 8-bit activations",
      per_channel=False,
      methods=layerwise,
      **size,
    ),
    "clado_channel": Section(
      name="clado_channel",
      title=f"{_title(clado)} weights with a scale per output channel, 8-bit activations",
      per_channel=True,
      methods=layerwise,
      **size,
    ),
    "wide": Section(name="wide", title=_title(wide), bits=wide, methods=layerwise, **average),
    "float8": Section(
      name="float8",
      title="8 bits and floating point",
      bits=(8, FLOAT),
      kept=FLOAT,
      unit="share in 8 bits",
      budgets=shares,
      methods=tuple(m for m in chosen if m in WITH_FLOAT),
      pairs=False,
      loss="kl",
      **same,
    ),
  }
  sections = tuple(made[name] for name in _known("sections", part.sections, tuple(made)))
  for section in sections:
    low, high = min(section.bits), max(section.bits)
    for budget in averages if section.unit == "average bits" else ():
      if not low <= budget <= high:
        raise ValueError(
          f"config.comparison.averages: {budget:g} with bits {section.bits} ({section.name}); "
          f"{low}..{high} is feasible"
        )
  return sections


def _title(bits: tuple[int, ...]) -> str:
  return f"{', '.join(map(str, bits[:-1]))} and {bits[-1]} bits"


def _known(name: str, given, known: tuple[str, ...]) -> tuple[str, ...]:
  """Values from a list, in its order."""
  for value in given:
    if value not in known:
      raise ValueError(f"config.comparison.{name}: {value!r} is not one of {', '.join(known)}")
  if not given:
    raise ValueError(f"config.comparison.{name}: empty; give some of {', '.join(known)}")
  return tuple(value for value in known if value in given)


def _bits(name: str, given) -> tuple[int, ...]:
  with field(f"config.comparison.{name}"):
    bits = tuple(given)
    if wrong := [b for b in bits if isinstance(b, bool) or b not in range(2, 9)]:
      raise ValueError(f"{wrong[0]!r}; widths of 2..8 are accepted")
    if len(set(bits)) < max(len(bits), 2) or 8 not in bits:
      raise ValueError(f"{bits}; at least two different widths, 8 among them, are accepted")
    return tuple(sorted(bits))


def _budgets(name: str, given, low: float, high: float) -> tuple[float, ...]:
  for value in given:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
      raise ValueError(
        f"config.comparison.{name}: {value!r}; {low:g}..{high:g} is accepted, the smallest "
        f"feasible is {low:g}"
      )
  if not given:
    raise ValueError(f"config.comparison.{name}: empty; give numbers in {low:g}..{high:g}")
  return tuple(sorted({float(value) for value in given}))
