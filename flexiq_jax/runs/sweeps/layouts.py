"""Tables of collected rows: what is a row, what a column, and which number stands where they meet.

A condition names the collected rows that belong to a heading, as `method=float` or
`method=flexiq_gram,ratio=0.25`; an empty value stands for an empty cell. A cell of the table is the
mean of its rows, with the sample standard deviation where they are of several seeds. Runs without
rows keep their line, and say why.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax.runs import tables
from flexiq_jax.runs.sweeps import collect

Heads = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a table is laid out.

  Attributes:
    title: heading of the column of row names.
    rows: (name of a row, condition), from top to bottom; or a column whose values name the rows.
    columns: (heading, condition), or (heading, condition, column) with a value of its own.
    value: the collected column that is shown.
    digits: decimals.
    spread: whether the standard deviation over seeds is shown.
  """

  title: str
  rows: Heads | str
  columns: tuple[tuple[str, ...], ...]
  value: str = "top1"
  digits: int = 2
  spread: bool = True


def cells(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """Header and cells of a table as text."""
  body, index = [], Index(rows)
  for name, condition in heads(layout, rows):
    own = Index(index.find(condition))
    line = [_cell(layout, column, own) for column in layout.columns]
    if all(cell == tables.DASH for cell in line) and (why := collect.unfinished(own.rows)):
      line[0] = "; ".join(dict.fromkeys(why.values()))
    body.append([name, *line])
  return [layout.title, *(column[0] for column in layout.columns)], body


def markdown(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table in GitHub's Markdown."""
  return tables.markdown_table(*cells(layout, rows))


def latex(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table as a `tabular` of LaTeX with booktabs' rules."""
  header, body = cells(layout, rows)
  lines = [" & ".join(map(_escape, line)) + r" \\" for line in (header, *body)]
  spec = "l" + "r" * (len(header) - 1)
  begin = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", lines[0], r"\midrule"]
  return "\n".join([*begin, *lines[1:], r"\bottomrule", r"\end{tabular}"])


def heads(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> Heads:
  """Names and conditions of a table's rows."""
  if not isinstance(layout.rows, str):
    return layout.rows
  names = dict.fromkeys(row.get(layout.rows) for row in rows)
  return tuple((tables.number(name), f"{layout.rows}={_text(name)}") for name in names)


class Index:
  """Finds the rows that fulfil a condition, without looking at all of them each time.

  Attributes:
    rows: all of them.
  """

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    """Keeps the rows; a column is indexed when it is first asked for."""
    self.rows = rows
    self._columns: dict[str, dict[str, set[int]]] = {}

  def find(self, condition: str) -> list[Mapping[str, Any]]:
    """The rows that fulfil all parts of a condition, in their order."""
    found = set(range(len(self.rows)))
    for name, value in parts(condition):
      found &= self._column(name).get(value, set())
    return [self.rows[i] for i in sorted(found)]

  def _column(self, name: str) -> dict[str, set[int]]:
    if name not in self._columns:
      values: dict[str, set[int]] = {}
      for i, row in enumerate(self.rows):
        values.setdefault(_text(row.get(name)), set()).add(i)
      self._columns[name] = values
    return self._columns[name]


def parts(condition: str) -> list[tuple[str, str]]:
  """(column, value) of a condition.

  Raises:
    ValueError: a part of it is something else.
  """
  found = []
  for part in filter(None, condition.split(",")):
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(f"condition {condition!r}: {part!r} is not column=value")
    found.append((name, _text(_as_number(value))))
  return found


def _cell(layout: Layout, column: Sequence[str], rows: Index) -> str:
  _, condition, *own = column
  name = own[0] if own else layout.value
  found = rows.find(condition)
  values = [row[name] for row in found if isinstance(row.get(name), int | float)]
  if not values:
    return tables.DASH
  if name == "images":
    return f"{round(float(np.mean(values))):,}"
  spread = float(np.std(values, ddof=1)) if len(values) > 1 and layout.spread else None
  return tables.mean_spread(float(np.mean(values)), spread, layout.digits)


def _as_number(text: str) -> Any:
  try:
    return float(text)
  except ValueError:
    return text


def _text(value: Any) -> str:
  """A value as it is compared: numbers of one value are alike however they are written."""
  if value is None:
    return ""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return f"{float(value):.6g}"
  return str(value)


def _escape(text: str) -> str:
  """A cell with LaTeX's own characters made plain."""
  text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "\0"))
  for plain, command in (("\0", r"\textbackslash{}"), ("~", r"\textasciitilde{}")):
    text = text.replace(plain, command)
  return text.replace("±", r"$\pm$").replace(tables.DASH, "--")
