"""Conditions on collected rows, and an index that finds the rows of one.

A condition is `column=value`, several joined by commas; an empty value stands for an empty cell. Of
alternatives, as `training=ptq|training=distilled`, the first that finds rows counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flexiq_jax.runs.sweeps import states


class Index:
  """Finds the rows that fulfil a condition, without looking at all of them each time.

  Attributes:
    rows: all of them.
  """

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    """Keeps the rows; a column is indexed when it is first asked for."""
    self.rows = rows
    self._columns: dict[str, dict[str, set[int]]] = {}
    self._unfinished = [row for row in rows if row["status"] != states.Status.FINISHED]

  def find(self, condition: str) -> list[Mapping[str, Any]]:
    """The rows that fulfil all parts of a condition, in their order."""
    for one in condition.split("|"):
      found = set(range(len(self.rows)))
      for name, value in parts(one):
        found &= self._column(name).get(value, set())
      if found:
        return [self.rows[i] for i in sorted(found)]
    return []

  def unfinished(self, condition: str) -> list[Mapping[str, Any]]:
    """The rows of cells without numbers that would fulfil a condition, had they run."""
    for one in condition.split("|"):
      wanted = parts(one)
      alike = lambda row, of=wanted: all(text_of(row.get(name)) in ("", v) for name, v in of)
      if found := [row for row in self._unfinished if alike(row)]:
        return found
    return []

  def _column(self, name: str) -> dict[str, set[int]]:
    if name not in self._columns:
      values: dict[str, set[int]] = {}
      for i, row in enumerate(self.rows):
        values.setdefault(text_of(row.get(name)), set()).add(i)
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
    found.append((name, text_of(_as_number(value))))
  return found


def _as_number(text: str) -> Any:
  try:
    return float(text)
  except ValueError:
    return text


def text_of(value: Any) -> str:
  """A value as it is compared: numbers of one value are alike however they are written."""
  if value is None:
    return ""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return f"{float(value):.6g}"
  return str(value)
