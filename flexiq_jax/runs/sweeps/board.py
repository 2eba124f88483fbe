"""The live table of a sweep: on a terminal it stays in place, elsewhere changes are lines."""

import collections
import datetime
import sys
import time
from collections.abc import Callable, Container, Sequence
from typing import TextIO

import rich.console
import rich.live
import rich.table
import rich.text

from flexiq_jax.runs import interruption
from flexiq_jax.runs.sweeps import states
from flexiq_jax.runs.sweeps.cells import Cell
from flexiq_jax.runs.sweeps.states import State, Status

_COLOURS = {
  Status.FINISHED: "green",
  Status.RUNNING: "cyan",
  Status.FAILED: "red",
  Status.STOPPED: "yellow",
  Status.MISSING: "dim",
}
_FIRST = (Status.RUNNING, Status.FAILED, Status.STOPPED, Status.QUEUED, Status.WAITING)
_ALL = 15.0  # seconds between two looks at cells that are not running


class Board:
  """Shows the cells; an executor calls `update` at least every `interval` seconds."""

  def __init__(
    self,
    cells: Sequence[Cell],
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display; it starts with the `with` block.

    Args:
      cells: all of the sweep.
      stream: where to write, standard output if None.
      clock: seconds, any origin.
    """
    self._cells, self._clock = cells, clock
    self._stream = sys.stdout if stream is None else stream
    self._live: rich.live.Live | None = None
    self._states: dict[str, State] = {}
    self._looked = self._told = float("-inf")
    self._minute = 60.0  # between two plain lines on how far it is
    self.interval = 2.0 if self._stream.isatty() else 5.0

  def __enter__(self) -> "Board":
    if self._stream.isatty():
      console = rich.console.Console(file=self._stream)
      self._live = rich.live.Live(console=console, auto_refresh=False, transient=True)
      self._live.start()
    self._told = self._clock()
    self._look()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live is not None:
      self._live.stop()
    self._live = None

  def say(self, text: str) -> None:
    """Prints a line beside the table."""
    if self._live is not None:
      self._live.console.print(rich.text.Text(text), soft_wrap=True)
    else:
      print(text, file=self._stream, flush=True)

  def update(self, changed: Sequence[Cell] = ()) -> None:
    """Looks at the cells and shows what changed.

    Args:
      changed: cells to look at in any case.

    Raises:
      KeyboardInterrupt: a signal has arrived (see `interruption`).
    """
    interruption.check()
    before = dict(self._states)
    self._look({cell.name for cell in changed})
    if self._live is not None:
      self._live.update(self._table(), refresh=True)
      return
    for cell in self._cells:
      state = self._states[cell.name]
      if state.status != before[cell.name].status:
        told = f": {state.message}" if state.message and state.status != Status.RUNNING else ""
        self.say(f"{_clock_time()} {cell.name}: {state.status}{told}")
        self._told = self._clock()
    if self._clock() - self._told >= self._minute:
      self._told = self._clock()
      running = [c for c in self._cells if self._states[c.name].status == Status.RUNNING]
      for cell in running:
        left = states.left(cell)
        step = self._states[cell.name].step
        self.say(f"{_clock_time()} {cell.name}: {step}" + f"; about {left}" * bool(left))
      self.say(f"{_clock_time()} {self.summary()}")

  def summary(self) -> str:
    """How many cells are in which state, as `3 finished, 1 running`."""
    counts = collections.Counter(state.status for state in self._states.values())
    return ", ".join(f"{counts[s]} {s}" for s in Status if counts[s])

  def _look(self, changed: Container[str] = ()) -> None:
    """Reads the states: of running cells always, of those that ended never again."""
    now = self._clock()
    every = now - self._looked >= _ALL
    if every:
      self._looked = now
    for cell in self._cells:
      known = self._states.get(cell.name)
      over = known is not None and known.status in (Status.FINISHED, Status.MISSING)
      due = known is None or every or known.status == Status.RUNNING or cell.name in changed
      if due and not over:
        self._states[cell.name] = states.state(cell)

  def _table(self) -> rich.table.Table:
    assert self._live is not None
    rows = max(3, self._live.console.height - 5)
    order = {status: i for i, status in enumerate(_FIRST)}
    shown = sorted(self._cells, key=lambda c: order.get(self._states[c.name].status, len(order)))
    table = rich.table.Table(box=None, title=self.summary(), title_justify="left")
    for name in ("cell", "state", "step", "time left"):
      table.add_column(name, no_wrap=True, overflow="ellipsis")
    for cell in shown[:rows]:
      state = self._states[cell.name]
      running = state.status == Status.RUNNING
      table.add_row(
        rich.text.Text(cell.name),
        rich.text.Text(state.status, style=_COLOURS.get(state.status, "")),
        rich.text.Text(state.step if running else state.message),
        states.left(cell).removesuffix(" left") if running else "",
      )
    if len(shown) > rows:
      table.add_row(f"and {len(shown) - rows} more")
    return table


def _clock_time() -> str:
  return datetime.datetime.now().astimezone().strftime("%H:%M:%S")
