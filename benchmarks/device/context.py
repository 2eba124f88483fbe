"""What a step is given: its time, its folder, where to keep what it has measured so far."""

import dataclasses
import pathlib
import time
from typing import Any

from benchmarks.device import records


class Skipped(Exception):
  """A step that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """The surroundings of a step.

  Attributes:
    step: its name.
    folder: of the whole run, with the results of earlier steps.
    seconds: time box, from `started` on; the step stops measuring by itself when it is over.
    small: sizes of a trial.
    options: of the step (see `steps.Step`).
    started: `time.monotonic()` when the process began.
  """

  step: str
  folder: pathlib.Path
  seconds: float
  small: bool = False
  options: tuple[str, ...] = ()
  started: float = dataclasses.field(default_factory=time.monotonic)

  @property
  def partial(self) -> pathlib.Path:
    """Where `save` writes."""
    return self.folder / "partial" / f"{self.step}.json"

  def left(self) -> float:
    """Seconds of the time box that are left; negative after its end."""
    return self.seconds - (time.monotonic() - self.started)

  def save(self, result: dict[str, Any], complete: bool = False) -> None:
    """Keeps what is measured so far: if the step is killed, this is its result."""
    records.write(self.partial, {"result": result, "complete": complete, "skipped": ""})

  def skip(self, why: str) -> None:
    """Keeps why the step did not run."""
    records.write(self.partial, {"result": None, "complete": False, "skipped": why})

  def earlier(self, step: str) -> dict[str, Any]:
    """The result of another step of this run; empty where there is none."""
    found = records.read_partial(self.folder / "partial" / f"{step}.json").get("result")
    return found if isinstance(found, dict) else {}


def claim(what: str, result: str) -> dict[str, str]:
  """A row for docs/hardware.md."""
  return {"claim": what, "result": result}
