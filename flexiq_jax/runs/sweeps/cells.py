"""A cell of a sweep: one ordinary run."""

import collections
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of a sweep.

  Attributes:
    name: unique in its sweep.
    workdir: of the run.
    command: what starts or resumes the run, from `folder`; the first item is the interpreter.
    folder: working directory of the command.
    labels: column -> value, which tell the rows of this cell from those of others.
    config: the run's config, plain; None where it is not known.
    minutes, memory: estimated time, and host memory in GiB; 0 where nothing is known.
    gpus: how many the run needs.
    tasks: processes of the run, which find each other under SLURM (`jax.distributed`).
    missing: why the run cannot start here; empty where it can.
    other: why the run in the workdir is not this one; empty where it is.
    noted: in what the run differs from the plan, where it may.
  """

  name: str
  workdir: Path
  command: tuple[str, ...]
  folder: Path = Path()
  labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] | None = None
  minutes: float = 0.0
  memory: float = 0.0
  gpus: int = 0
  tasks: int = 1
  missing: str = ""
  other: str = ""
  noted: str = ""

  @property
  def log(self) -> Path:
    """What the run prints, all attempts one after the other."""
    return self.workdir / "log.txt"

  @property
  def finished(self) -> bool:
    """Whether the run is complete; that of another config in its workdir is not this one."""
    return not self.other and (self.workdir / "finished").exists()


def require_unique(cells: Sequence[Cell]) -> None:
  """Refuses two cells of one name or one workdir.

  Raises:
    ValueError: names the two.
  """
  for what in ("name", "workdir"):
    counts = collections.Counter(str(getattr(cell, what)) for cell in cells)
    value, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
      alike = [cell for cell in cells if str(getattr(cell, what)) == value]
      raise ValueError(
        f"{count} cells have the {what} {value!r} ({alike[0].labels}, {alike[1].labels}): give "
        "their bases other names, or take one away"
      )


def select(cells: Sequence[Cell], only: str) -> list[Cell]:
  """The cells whose name a regular expression is found in.

  Raises:
    ValueError: it is none, or is found in no name.
  """
  try:
    pattern = re.compile(only)
  except re.error as error:
    raise ValueError(f"only: {only!r} is no regular expression ({error})") from None
  found = [cell for cell in cells if pattern.search(cell.name)]
  if not found:
    names = [cell.name for cell in cells]
    close = difflib.get_close_matches(only, names, n=3, cutoff=0.4) or names[:3]
    raise ValueError(f"only: {only!r} is found in no cell's name; names are as {', '.join(close)}")
  return found
