"""What `make device` writes: one record a step, and the summary that holds them all.

| file | what |
|---|---|
| `FOLDER/STEP.json` | a `Record`, written when the step has ended |
| `FOLDER/partial/STEP.json` | what the step had measured so far, written by the step itself |
| `FOLDER/summary.json` | a `Summary` with all records, written again after every step |

A step's result is a dict of its own, with `claims` for docs/hardware.md. Standard library only:
what is broken on a machine must not keep its record from being written.
"""

import dataclasses
import json
import math
import os
import pathlib
import types
import typing
import uuid
from typing import Any

VERSION = 1
STATUSES = ("done", "failed", "timed_out", "skipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """How one step ended.

  Attributes:
    step: its name.
    status: a word of `STATUSES`.
    why: the reason where it is not done, else empty.
    seconds: wall time.
    limit: seconds that it was given.
    complete: whether the result is all that the step measures; a step that ends at its own time
      box is done and not complete.
    result: what it measured, possibly in part; None where there is nothing.
    tail: the end of what it printed.
  """

  step: str
  status: str
  why: str
  seconds: float
  limit: float
  complete: bool
  result: dict[str, Any] | None
  tail: str

  def __post_init__(self):
    _require_types(self, "record")
    if self.status not in STATUSES:
      raise ValueError(f"record.status: {self.status!r}; one of {', '.join(STATUSES)} is accepted")
    if self.status == "done" and self.result is None:
      raise ValueError(f"record.result: None of {self.step!r}, which is done; a dict is accepted")
    if self.status != "done" and not self.why:
      raise ValueError(f"record.why: empty, but {self.step!r} is {self.status}; say why")
    for claim in (self.result or {}).get("claims", []):
      if not isinstance(claim, dict) or {*claim} != {"claim", "result"}:
        raise ValueError(f"record.result.claims: {claim!r}; claim and result are accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """One run.

  Attributes:
    version: of this schema.
    made: `measured`, always: nothing in it is estimated.
    date: day it was made, YYYY-MM-DD.
    command: that made it.
    small: whether sizes were those of a trial, which are no results.
    machine: device, platform and versions (see `machine.py`).
    seconds: wall time of all steps.
    steps: records, in the order they ran.
  """

  version: int
  made: str
  date: str
  command: str
  small: bool
  machine: dict[str, Any]
  seconds: float
  steps: list[Record]

  def __post_init__(self):
    _require_types(self, "summary")
    if self.version != VERSION:
      raise ValueError(f"summary.version: {self.version}; {VERSION} is accepted")
    if self.made != "measured":
      raise ValueError(f"summary.made: {self.made!r}; 'measured' is accepted")
    for name in ("device_kind", "platform"):
      if not isinstance(self.machine.get(name), str):
        raise ValueError(f"summary.machine.{name}: {self.machine.get(name)!r}; a name is accepted")

  @property
  def measured(self) -> bool:
    """Whether this is of an accelerator, at full size."""
    return not self.small and self.machine["platform"] != "cpu"


def _require_types(value: Any, name: str) -> None:
  for field in dataclasses.fields(value):
    found, kind = getattr(value, field.name), typing.cast(Any, field.type)
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    accepted: tuple[Any, ...] = tuple(typing.get_origin(part) or part for part in parts)
    if float in accepted:
      accepted = (*accepted, int)
    if not isinstance(found, accepted) or (isinstance(found, bool) and bool not in accepted):
      raise ValueError(f"{name}.{field.name}: {found!r}; {kind} is accepted")


def to_json(value: Record | Summary | dict[str, Any]) -> str:
  """The text of a file; `nan` and `inf`, which JSON does not have, become words."""
  plain = value if isinstance(value, dict) else dataclasses.asdict(value)
  return json.dumps(_finite(plain), indent=1, allow_nan=False, default=_plain) + "\n"


def _finite(value: Any) -> Any:
  """A step must not fail because one of its many numbers is none."""
  if isinstance(value, dict):
    return {key: _finite(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(each) for each in value]
  if hasattr(value, "item"):
    value = _plain(value)
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
  """NumPy and JAX scalars as Python's; anything else is a mistake of the step."""
  if hasattr(value, "item"):
    return value.item()
  raise TypeError(f"{type(value).__name__}: no value that JSON can hold")


def write(path: pathlib.Path, value: Record | Summary | dict[str, Any]) -> None:
  """Writes a file atomically: a reader, or a crash, meets the old content or the new."""
  text = to_json(value)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def read_partial(path: pathlib.Path) -> dict[str, Any]:
  """What a step wrote of itself; empty where there is nothing or only damage."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def read_record(path: pathlib.Path) -> Record:
  """Reads and checks a step's record."""
  return _read(path, lambda d: Record(**d))


def read_summary(path: pathlib.Path) -> Summary:
  """Reads and checks a summary.

  Raises:
    ValueError: not a summary; names the file and the field.
  """
  return _read(path, _summary)


def _summary(document: dict[str, Any]) -> Summary:
  document["steps"] = [Record(**record) for record in document["steps"]]
  return Summary(**document)


def _read(path: pathlib.Path, make: Any) -> Any:
  try:
    return make(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: not what `make device` writes: {error}") from error
