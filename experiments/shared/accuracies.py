"""Accuracies that serving takes from finished runs: by ratio, and of layer-wise plans."""

import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flexiq_jax.runs import tables

_CHANNELS = ("flexiq_greedy", "flexiq")  # of a comparison's methods those that split layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plans:
  """Layer-wise plans of one method.

  Attributes:
    top1: share of the MACs in 4 bits -> top-1 in %, mean over seeds.
    source: one sentence for a report: which rows of which file.
  """

  top1: Mapping[float, float]
  source: str


def by_ratio(
  path: str | os.PathLike[str], method: str, *, ends: bool = True
) -> tuple[dict[float, float], float | None]:
  """Reads accuracies from a finished run.

  Args:
    path: its workdir, or its results.csv; "" for none.
    method: of its rows.
    ends: whether there have to be rows at 0 % and 100 %.

  Returns:
    Top-1 by ratio of the method, of the first seed that has it, and that of uniform INT4 or None.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: it has no such rows.
  """
  if not path:
    return {}, None
  curve, methods, int4 = {}, {}, None
  for row in _rows(path, _table(path)):
    if row["method"] == "uniform_int4":
      int4 = _number(path, row, "top1")
    if row.get("ratio"):
      methods[row["method"]] = None
      if row["method"] == method:
        curve.setdefault(_number(path, row, "ratio"), _number(path, row, "top1"))
  if not curve or (ends and not {0.0, 1.0} <= curve.keys()):
    known = ", ".join(methods) or "none"
    where = " at 0 % and 100 %" if ends else ""
    raise ValueError(
      f"{str(path)!r} has no rows of {method!r}{where}; methods with ratios: {known}"
    )
  return curve, int4


def of_plans(path: str | os.PathLike[str], method: str) -> Plans:
  """Reads what layer-wise plans reach from a comparison with several average bits.

  A plan counts at the share of the MACs that it has in 4 bits, not at the budget that it was made
  for: whole layers seldom meet an average. Seeds are averaged, shares as well as accuracies.

  Args:
    path: workdir of the comparison or of one of its seeds, or a results.csv.
    method: of the rows, one that gives whole layers their bits.

  Raises:
    FileNotFoundError: there is no such comparison.
    ValueError: it has no such plans, or fewer than two that differ.
  """
  seeds, methods, found = {}, {}, {}
  for table in _tables(path):
    for row in _rows(path, table):
      if row.get("table") != "main" or row["method"] in _CHANNELS:
        continue
      methods[row["method"]] = None
      if row["method"] == method:
        bits = _number(path, row, "avg_bits")
        if not 4 <= bits <= 8:
          raise ValueError(f"{str(path)!r}: avg_bits of {method!r}: {bits:g}; 4..8 is accepted")
        budget = _number(path, row, "ratio")
        found.setdefault(budget, []).append(((8 - bits) / 4, _number(path, row, "top1")))
        seeds[row.get("seed") or "0"] = None
  if method not in methods:
    known = ", ".join(methods) or "none; the workdir of configs/compare_cifar10.py is accepted"
    raise ValueError(f"{str(path)!r} has no rows of {method!r}; layer-wise methods there: {known}")
  counts = {len(values) for values in found.values()}
  if len(counts) > 1:
    raise ValueError(
      f"{str(path)!r}: some budgets of {method!r} have {min(counts)} seeds, others {max(counts)}; "
      "a comparison that has ended is accepted"
    )
  top1 = {}
  for budget in sorted(found):
    share, value = np.mean(found[budget], axis=0).tolist()
    top1[round(share, 6)] = value
  if len(top1) < 2:
    raise ValueError(f"{str(path)!r}: {len(top1)} plan of {method!r}; two or more are accepted")
  curve = ", ".join(f"{tables.percent(s, 1)}: {top1[s]:.2f}" for s in sorted(top1))
  over = f"seed {next(iter(seeds))}" if len(seeds) == 1 else f"mean of seeds {', '.join(seeds)}"
  return Plans(
    top1=dict(sorted(top1.items())),
    source=f"Layer-wise plans: rows `{method}` of `{path}`, {over}, at the share of MACs that each "
    f"has in 4 bits ({curve}). A plan is taken to be as fast as FlexiQ at that share.",
  )


def _tables(path: str | os.PathLike[str]) -> list[Path]:
  """The results.csv of a run, or of all seeds of a table."""
  folder = Path(os.path.expandvars(path))
  return sorted(folder.glob("seed*/results.csv")) or [_table(path)]


def _table(path: str | os.PathLike[str]) -> Path:
  file = Path(os.path.expandvars(path))
  file = file / "results.csv" if file.is_dir() else file
  if not file.is_file():
    raise FileNotFoundError(
      f"{str(path)!r}: no results.csv there; name the workdir of a finished run"
    )
  return file


def _rows(path: str | os.PathLike[str], table: Path) -> Iterator[dict[str, str]]:
  """Rows that have a top-1."""
  with table.open(newline="", encoding="utf-8") as opened:
    reader = csv.DictReader(opened)
    if missing := {"method", "ratio", "top1"} - set(reader.fieldnames or ()):
      raise ValueError(
        f"{str(path)!r}: no column {min(missing)!r}; a run's results.csv is accepted"
      )
    yield from (row for row in reader if row["top1"])


def _number(path: str | os.PathLike[str], row: Mapping[str, str], column: str) -> float:
  try:
    value = float(row.get(column) or "nan")
  except ValueError:
    value = np.nan
  if not np.isfinite(value):
    raise ValueError(
      f"{str(path)!r}: {column} of {row['method']!r}: {row.get(column)!r}; a number is accepted"
    )
  return value
