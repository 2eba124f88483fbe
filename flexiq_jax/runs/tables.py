"""Numbers and tables as text: SI units, mean and spread over seeds, Markdown and plain tables.

The spread of n seeds is the sample standard deviation (divisor n - 1), absent for one seed.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

DASH = "—"  # an empty cell

_PREFIXES = ("", "k", "M", "G", "T", "P")


def si(value: float | None, unit: str = "") -> str:
  """Three significant digits with an SI prefix, as `41.3 M`; whole numbers below 1000 as they are.

  Args:
    value: a count of at least 0, or None for an empty cell.
    unit: what follows the prefix, as `B`.
  """
  if value is None:
    return DASH
  power = 0
  # 999.5 and above would print as 1000.
  while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
    value, power = value / 1000, power + 1
  if power == 0 and float(value).is_integer():
    digits = 0
  else:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
  return f"{value:.{digits}f} {_PREFIXES[power]}{unit}".rstrip()


def number(value: Any, digits: int = 2) -> str:
  """A cell of a table: floats with `digits` decimals, None and nan as a dash, text as it is."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return DASH
  if isinstance(value, float | np.floating):
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no -0.00
  return str(value)


def percent(fraction: float | None, digits: int = 0) -> str:
  """A fraction in 0..1 as a percentage, as `25 %`."""
  return DASH if fraction is None else f"{100 * fraction:.{digits}f} %"


def mean_spread(mean: float | None, spread: float | None, digits: int = 2) -> str:
  """`91.80 ± 0.12`, or the mean alone where there is no spread."""
  if mean is None or spread is None:
    return number(mean, digits)
  return f"{number(mean, digits)} ± {spread:.{digits}f}"


def aggregate(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Joins the rows of each (method, ratio) over its seeds.

  Args:
    rows: result rows as `Workdir.rows` gives them.

  Returns:
    One dict for each (method, ratio): `method`, `ratio`, `seeds` (their number), and for every
    numeric column its mean, as `top1`, and its spread, as `top1_spread` (None for one value). A
    column that no row has a number for is None. Methods in order of appearance, ratios ascending
    with None first.
  """
  groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
  columns: dict[str, None] = {}
  for row in rows:
    ratio = row.get("ratio")
    groups.setdefault((row["method"], None if ratio is None else round(ratio, 6)), []).append(row)
    columns |= dict.fromkeys(name for name in row if name not in ("method", "ratio", "seed"))
  order = {method: i for i, method in reversed(list(enumerate(method for method, _ in groups)))}
  joined = []
  for (method, ratio), members in sorted(
    groups.items(), key=lambda item: (order[item[0][0]], -1 if item[0][1] is None else item[0][1])
  ):
    record: dict[str, Any] = {"method": method, "ratio": ratio, "seeds": len(members)}
    for name in columns:
      values = [m[name] for m in members if _is_number(m.get(name))]
      record[name] = float(np.mean(values)) if values else None
      record[f"{name}_spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    joined.append(record)
  return joined


def curves(
  rows: Iterable[Mapping[str, Any]], column: str = "top1"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The rows as arrays for a plot.

  Args:
    rows: result rows; those without a ratio or without a number in `column` are left out.
    column: the y axis.

  Returns:
    For each method `(ratios [R] ascending, values [S, R])`, one row per seed, nan where a seed
    lacks that ratio.
  """
  points: dict[str, dict[tuple[Any, float], float]] = {}
  for row in rows:
    if row.get("ratio") is not None and _is_number(row.get(column)):
      key = (row.get("seed"), round(row["ratio"], 6))
      points.setdefault(row["method"], {})[key] = row[column]
  result = {}
  for method, values in points.items():
    seeds = list(dict.fromkeys(seed for seed, _ in values))
    ratios = sorted({ratio for _, ratio in values})
    grid = np.array([[values.get((seed, ratio), np.nan) for ratio in ratios] for seed in seeds])
    result[method] = (np.array(ratios), grid)
  return result


def text_table(
  header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, totals: bool = False
) -> str:
  """A plain table: columns two blanks apart, a rule below the header.

  Args:
    header: column names.
    rows: cells as text, as many in each row as the header has.
    left: how many leading columns are left-aligned; the others are right-aligned.
    totals: whether the last row is one of totals, which a rule sets apart.

  Raises:
    ValueError: a row has another number of cells than the header.
  """
  _check(header, rows)
  widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
  rule = ["-" * width for width in widths]
  lines = []
  body = [*rows[:-1], rule, rows[-1]] if totals else rows
  for row in (header, rule, *body):
    cells = (
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
  """The same table in GitHub's Markdown; cells are escaped.

  Args:
    header: column names.
    rows: cells as text, as many in each row as the header has.
    left: how many leading columns are left-aligned; the others are right-aligned.

  Raises:
    ValueError: a row has another number of cells than the header.
  """
  _check(header, rows)
  rule = [":--" if i < left else "--:" for i in range(len(header))]
  body = [[escape(cell) for cell in row] for row in (header, *rows)]
  return "\n".join(f"| {' | '.join(row)} |" for row in (body[0], rule, *body[1:]))


def escape(text: str) -> str:
  """Takes the meaning from characters that would break a Markdown table or restyle its text."""
  text = re.sub(r"([\\|*`<~\[\]])", r"\\\1", text)
  # Within a word an underscore is one; only at its ends does it start or end emphasis.
  text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
  return " ".join(text.split())


def _check(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  for row in rows:
    if len(row) != len(header):
      raise ValueError(f"row {list(row)!r} has {len(row)} cells: the header has {len(header)}")


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
