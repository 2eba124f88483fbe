"""How far a stage is: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

import rich.console
import rich.progress

from flexiq_jax.runs import interruption


class Progress:
  """Progress of one stage: a bar on a terminal, else plain lines at a bounded rate.

  Plain output has a line for the first step, one for the last, and between them at most one in
  `interval` seconds, so that a log file of a long run stays short.

      with Progress("search", total=200) as progress:
        for generation in range(200):
          ...
          progress.update(note=f"best {best:.3f}")
  """

  def __init__(
    self,
    description: str,
    total: int | None = None,
    *,
    interval: float = 10.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    began: float | None = None,
  ):
    """Prepares the display; it starts with the `with` block.

    Args:
      description: name of the stage.
      total: number of steps, or None where it is not known.
      interval: least time between two plain lines, seconds.
      stream: where to write, standard output if None.
      clock: seconds, any origin.
      began: when the stage began, by the clock; with the `with` block if None.
    """
    self._description, self._total, self._interval = description, total, interval
    self._stream = sys.stdout if stream is None else stream
    self._clock = clock
    self._done, self._note = 0, ""
    self._bar: rich.progress.Progress | None = None
    self._task = rich.progress.TaskID(0)
    self._began, self._start, self._last = began, 0.0, 0.0
    self._printed = -1  # the step of the latest plain line

  def __enter__(self) -> "Progress":
    self._start = self._clock() if self._began is None else self._began
    if self._stream.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        console=rich.console.Console(file=self._stream),
      )
      self._task = self._bar.add_task(self._description, total=self._total, note="")
      self._bar.start()
    return self

  def update(self, steps: int = 1, note: str = "") -> None:
    """Counts steps as done.

    Args:
      steps: how many more are done.
      note: a few words on the state, as `best 0.12`; shown until the next one.

    Raises:
      KeyboardInterrupt: a signal has arrived (see `interruption`).
    """
    interruption.check()
    self._done += steps
    self._note = note or self._note
    if self._bar is not None:
      self._bar.update(self._task, advance=steps, note=self._note)
      return
    now = self._clock()
    if self._printed < 0 or self._done == self._total or now - self._last >= self._interval:
      self._print(now)

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._printed != self._done and (self._done or kind is not None):
      self._print(self._clock(), "stopped at " if kind is not None else "")

  def _print(self, now: float, prefix: str = "") -> None:
    self._last, self._printed = now, self._done
    elapsed = now - self._start
    count = f"{self._done}/{self._total}" if self._total else str(self._done)
    parts = [f"{self._description}: {prefix}{count}", duration(elapsed)]
    if self._total and 0 < self._done < self._total and not prefix:
      parts.append(f"about {duration(elapsed / self._done * (self._total - self._done))} left")
    print(", ".join(parts + [self._note] * bool(self._note)), file=self._stream, flush=True)


class PassProgress:
  """Shows the calibration passes one after the other: called as `progress(pass, examples done)`."""

  def __init__(
    self,
    total: int,
    prefix: str = "",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display.

    Args:
      total: examples in each pass.
      prefix: in front of the name of the pass.
      stream: where to write, standard output if None.
      clock: seconds, any origin.
    """
    self._total, self._prefix, self._stream = total, prefix, stream
    self._clock, self._reported = clock, clock()
    self._name, self._done = "", 0
    self._bar: Progress | None = None

  def __enter__(self) -> "PassProgress":
    return self

  def __call__(self, name: str, done: int) -> None:
    if self._bar is None or name != self._name:
      self.__exit__(None, None, None)
      self._name, self._done = name, 0
      # The first report comes when the first batch is done: the pass began with the last report.
      self._bar = Progress(
        f"{self._prefix}{name}, examples",
        self._total,
        stream=self._stream,
        clock=self._clock,
        began=self._reported,
      )
      self._bar.__enter__()
    self._bar.update(done - self._done)
    self._done, self._reported = done, self._clock()

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if self._bar is not None:
      self._bar.__exit__(kind, *error)
      self._bar = None


def duration(seconds: float) -> str:
  """A time span as `8.2 s`, `4 min 05 s` or `2 h 07 min`."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  whole = round(seconds)
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02d} s"
  minutes = round(seconds / 60)
  return f"{minutes // 60} h {minutes % 60:02d} min"


def seconds(text: str) -> float:
  """What `duration` wrote, back.

  Raises:
    ValueError: it is something else.
  """
  units = {"h": 3600.0, "min": 60.0, "s": 1.0}
  words = text.split()
  if not words or len(words) % 2 or any(unit not in units for unit in words[1::2]):
    raise ValueError(f"{text!r} is no duration, as '4 min 05 s'")
  return sum(
    float(count) * units[unit] for count, unit in zip(words[::2], words[1::2], strict=True)
  )
