"""The tables of a comparison: which bits may be chosen, what limits them, what else is fixed.

| table | weights | activations | other layers | budget |
|---|---|---|---|---|
| `main` | 4, 8 | as the weights | 8 bits | average bits |
| `clado_tensor` | 2, 4, 8, one scale per layer | 8 | float | size |
| `clado_channel` | 2, 4, 8, a scale per output channel | 8 | float | size |
| `wide` | 2, 3, 4, 6, 8 | as the weights | 8 bits | average bits |
| `float8` | 8, float | as the weights | float | share in 8 bits |

`flexiq_jax.methods.Task` says what the budgets are. Limits of size are CLADO's own experiment; 8
bits and float are what compilers offer, and QuantuneV2's other pair. A table has the methods that
fit it.

A row's `ratio` in results.csv is its budget: (8 - average bits) / 4, which for FlexiQ is the 4-bit
ratio, or the size, or the share. In tables other than `main`, the table's name stands before the
method's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from experiments.shared.checks import field
from flexiq_jax import methods
from flexiq_jax.methods import Method, Task
from flexiq_jax.methods.layerwise import FLOAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Task):
  """One table.

  Attributes:
    name: see above.
    title: heading of the table.
    budgets: average bits, or shares of the size or of the MACs.
    methods: what is compared, in this order, by their names.
  """

  name: str
  title: str
  budgets: tuple[float, ...]
  methods: Mapping[str, type[Method]]

  def ratio(self, budget: float) -> float:
    """The budget as it stands in results.csv."""
    return (8 - budget) / 4 if self.unit == "average bits" else budget

  def budget(self, ratio: float) -> float:
    """Inverse of `ratio`."""
    return 8 - 4 * ratio if self.unit == "average bits" else ratio

  def label(self, method: str) -> str:
    """The method as it stands in results.csv."""
    return method if self.name == "main" else f"{self.name}/{method}"


def tables_of(config) -> tuple[Table, ...]:
  """The tables that a config asks for.

  Raises:
    ValueError: a value is wrong; names the field.
  """
  part = config.comparison
  chosen = _methods(part.methods)
  main, wide, clado = (_bits(name, part[name]) for name in ("bits", "wide_bits", "clado_bits"))
  averages = _budgets("averages", part.averages, 4.0, 8.0)
  shares = _budgets("int8_shares", part.int8_shares, 0.0, 1.0)
  size: dict[str, Any] = {
    "kept": FLOAT,
    "activation_bits": 8,
    "bits": clado,
    "unit": "size",
    "budgets": _budgets("sizes", part.sizes, min(clado) / 8, 1.0),
  }
  same: dict[str, Any] = {"activation_bits": None, "per_channel": True}
  average: dict[str, Any] = {"kept": 8, "unit": "average bits", "budgets": averages, **same}
  given: dict[str, dict[str, Any]] = {
    "main": {"title": _title(main), "bits": main, "layers_only": False, **average},
    "clado_tensor": {
      "title": f"{_title(clado)} weights with a scale per layer, 8-bit activations",
      "per_channel": False,
      **size,
    },
    "clado_channel": {
      "title": f"{_title(clado)} weights with a scale per output channel, 8-bit activations",
      "per_channel": True,
      **size,
    },
    "wide": {"title": _title(wide), "bits": wide, **average},
    "float8": {
      "title": "8 bits and floating point",
      "bits": (8, FLOAT),
      "kept": FLOAT,
      "unit": "share in 8 bits",
      "budgets": shares,
      **same,
    },
  }
  tables = []
  for name in _known("tables", part.tables, tuple(given)):
    table = Table(name=name, methods={}, **given[name])
    fitting = {method: kind for method, kind in chosen.items() if kind.fits(table)}
    tables.append(dataclasses.replace(table, methods=fitting))
  for table in tables:
    low, high = min(table.bits), max(table.bits)
    for budget in averages if table.unit == "average bits" else ():
      if not low <= budget <= high:
        raise ValueError(
          f"config.comparison.averages: {budget:g} with bits {table.bits} ({table.name}); "
          f"{low}..{high} is feasible"
        )
  return tuple(tables)


def settings_of(part, method: type[Method]) -> Any:
  """What `config.comparison` says of a method; its defaults where it says nothing.

  A field stands there by its name, or below the method's own, as `config.comparison.ptmq.steps`.

  Raises:
    ValueError: a value is wrong; names the field.
  """
  names = [f.name for f in dataclasses.fields(method.Settings)]
  own = part.get(method.name, {})
  given = {name: part[name] for name in names if name in part and name not in own}
  with field(f"config.comparison.{method.name}" if own else "config.comparison", [*own, *part]):
    if unknown := [name for name in own if name not in names]:
      raise ValueError(f"{unknown[0]!r} is not one of {', '.join(names)}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in own.items()}
    return method.Settings(**given, **values)


def _title(bits: tuple[int, ...]) -> str:
  return f"{', '.join(map(str, bits[:-1]))} and {bits[-1]} bits"


def _methods(given) -> dict[str, type[Method]]:
  """The methods of a config by their names, in the order of `METHODS`; others come last."""
  with field("config.comparison.methods"):
    found = {method.name: method for method in map(methods.find, given)}
  if not found:
    known = ", ".join(methods.METHODS)
    raise ValueError(f"config.comparison.methods: empty; give some of {known}")
  return {name: found[name] for name in dict.fromkeys((*methods.METHODS, *found)) if name in found}


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
