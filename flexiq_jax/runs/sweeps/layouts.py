"""Tables of collected rows: what is a row, what a column, and which number stands where they meet.

A condition (see `conditions`) names the collected rows that belong to a heading, as `method=float`
or `method=flexiq_gram,ratio=0.25`. A cell of the table is the mean of its rows, with the sample
standard deviation where they are of several seeds. Runs without rows keep their place and say why;
where some of a cell's runs have rows, it says how many.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax.runs import tables
from flexiq_jax.runs.sweeps import states
from flexiq_jax.runs.sweeps.conditions import Index, text_of

# Statuses that say more than that a cell was not run.
_WORDS = {states.Status.FAILED: "failed", states.Status.MISSING: "not here"}
_MARK = "*"  # of numbers of runs that differ from the plan
_NAMED = 6  # of those runs, how many are named below a table; results.csv has all
Heads = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a table is laid out.

  Attributes:
    title: heading of the column of row names.
    rows: (name of a row, condition), from top to bottom; or a column whose values name the rows.
    columns: (heading, condition), or (heading, condition, column) with a value of its own; a
      fourth text is the condition of what is subtracted, seed by seed.
    value: the collected column that is shown.
    digits: decimals.
    spread: whether the standard deviation over seeds is shown.
    average: name of a last row with the mean of each column over the rows that have it; none if
      empty.
    given: (name, ((heading, text), ...)) of rows that were not run, such as what a paper claims.
  """

  title: str
  rows: Heads | str
  columns: tuple[tuple[str, ...], ...]
  value: str = "top1"
  digits: int = 2
  spread: bool = True
  average: str = ""
  given: tuple[tuple[str, Heads], ...] = ()


def cells(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  """Header and cells of a table as text."""
  return _table(layout, rows)[:2]


def _table(
  layout: Layout, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]], dict[str, dict[str, None]]]:
  """Header, cells, and what marked numbers are: remark -> runs."""
  body, means, index = [], [], Index(rows)
  headings = [column[0] for column in layout.columns]
  for name, condition in heads(layout, rows):
    own = Index(index.find(condition))
    found = [_found(layout, column, own, index, condition) for column in layout.columns]
    why = dict.fromkeys(_reason(row) for one in found for row in one.missing)
    if why and not any(one.values for one in found):
      body.append([name, "; ".join(why), *[tables.DASH] * (len(found) - 1)])
    else:
      body.append([name, *map(_shown, found)])
    means.append(found)
  if layout.average:
    body.append(
      [layout.average, *(_average(layout, column) for column in zip(*means, strict=True))]
    )
  for name, texts in layout.given:
    body.append([name, *(dict(texts).get(heading, tables.DASH) for heading in headings)])
  noted: dict[str, dict[str, None]] = {}
  for run, remark in (pair for line in means for one in line for pair in one.noted):
    noted.setdefault(remark, {})[run] = None
  return [layout.title, *headings], body, noted


def markdown(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table in GitHub's Markdown, and below it what its marks mean."""
  header, body, noted = _table(layout, rows)
  text = tables.markdown_table(header, body)
  remarks = "; ".join(f"{_names(tuple(runs))}: {remark}" for remark, runs in noted.items())
  return text + f"\n\n`{_MARK}`: {remarks}." if noted else text


def _names(runs: Sequence[str]) -> str:
  rest = len(runs) - _NAMED
  return ", ".join(runs[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


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
  return tuple((tables.number(name), f"{layout.rows}={text_of(name)}") for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
  """What a cell of a table is made of.

  Attributes:
    layout, column: of the cell.
    values: that are averaged.
    runs: how many runs they are of.
    missing: rows of runs that have none.
    noted: run and remark, of runs that are not quite what was planned.
  """

  layout: Layout
  column: Sequence[str]
  values: list[float]
  runs: int
  missing: list[Mapping[str, Any]]
  noted: tuple[tuple[str, str], ...]

  @property
  def counts(self) -> bool:
    """Whether it is a number of images."""
    return self.column[2:3] == ("images",)

  @property
  def mean(self) -> float:
    return float(np.mean(self.values))


def _found(
  layout: Layout, column: Sequence[str], own: Index, everything: Index, of_row: str
) -> _Found:
  """The values of a cell, and the runs that lack them."""
  _, condition, *more = column
  name, less = more[0] if more else layout.value, more[1:]
  alternatives = condition.split("|")
  chosen = [one for one in alternatives if own.find(one)][:1]
  rows = own.find(condition)
  values = _by_seed(rows, name)
  used = rows
  if less:
    used = [*rows, *own.find(less[0])]
    other = _by_seed(own.find(less[0]), name)
    values = {
      seed: [float(np.mean(values[seed]) - np.mean(other[seed]))]
      for seed in values
      if seed in other
    }
  missing = everything.unfinished("|".join(f"{of_row},{one}" for one in chosen or alternatives))
  if not values and (known := _by_seed(missing, name)):  # without running
    values, missing = known, []
  if less and not values and not missing:
    missing = everything.unfinished("|".join(f"{of_row},{one}" for one in less[0].split("|")))
  return _Found(
    layout=layout,
    column=column,
    values=[value for each in values.values() for value in each],
    runs=len({row.get("cell") for row in rows}),
    missing=missing,
    noted=tuple(
      dict.fromkeys((r["cell"], r["reason"]) for r in used if values and r.get("reason"))
    ),
  )


def _by_seed(rows: Sequence[Mapping[str, Any]], name: str) -> dict[Any, list[float]]:
  """Seed -> values of a column."""
  found: dict[Any, list[float]] = {}
  for row in rows:
    if isinstance(row.get(name), int | float):
      found.setdefault(row.get("seed"), []).append(row[name])
  return found


def _shown(found: _Found) -> str:
  if not found.values:
    missing = found.missing
    return _WORDS.get(missing[0]["status"], "not run") if missing else tables.DASH
  if found.counts:
    return f"{round(found.mean):,}"
  several = len(found.values) > 1 and found.layout.spread
  spread = float(np.std(found.values, ddof=1)) if several else None
  text = tables.mean_spread(found.mean, spread, found.layout.digits) + _MARK * bool(found.noted)
  return text + _share(found.runs, found.runs + len(found.missing))


def _average(layout: Layout, column: Sequence[_Found]) -> str:
  """The mean over the rows of a table that have a value."""
  means = [found.mean for found in column if found.values]
  if not means or column[0].counts:
    return tables.DASH
  return tables.number(float(np.mean(means)), layout.digits) + _share(len(means), len(column))


def _share(there: int, of: int) -> str:
  return f" ({there} of {of})" if there < of else ""


def _reason(row: Mapping[str, Any]) -> str:
  """Why a cell has no numbers."""
  said = _WORDS.get(row["status"], "not run")
  return f"{row['status']}: {row['reason']}" if row["reason"] else said


def _escape(text: str) -> str:
  """A cell with LaTeX's own characters made plain."""
  text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "\0"))
  for plain, command in (("\0", r"\textbackslash{}"), ("~", r"\textasciitilde{}")):
    text = text.replace(plain, command)
  return text.replace("±", r"$\pm$").replace(tables.DASH, "--")
