"""Ctrl-C and SIGTERM end a run in order, wherever they arrive.

Python raises in the main thread, between two bytecodes. An exception that is raised inside of a
callback of C code (JAX has one at garbage collections) is printed and lost, and the run would go
on. So the signal also leaves a mark, at which every step of a progress display and every checkpoint
looks (`check`).
"""

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec, TextIO, TypeVar

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C: 128 + SIGINT
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENDING = 10.0  # seconds in which a run that was interrupted may end before a signal raises again
_arrived = threading.Event()
P = ParamSpec("P")
R = TypeVar("R")


def check() -> None:
  """Raises KeyboardInterrupt where a signal has arrived and its exception was lost."""
  if _arrived.is_set():
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(stream: TextIO | None = None) -> Iterator[None]:
  """Lets Ctrl-C and SIGTERM (as from SLURM) end the run in order, with exit status 130.

  Both raise KeyboardInterrupt, so that `with` and `finally` blocks of the current stage run; while
  they do, further signals are ignored. A computation on the device finishes first.

  Args:
    stream: where the one line goes, standard error if None.

  Raises:
    SystemExit: with status 130, in place of KeyboardInterrupt.
  """
  raised = -_ENDING

  def interrupt(number: int, frame: FrameType | None) -> None:
    nonlocal raised
    _arrived.set()
    if time.monotonic() - raised >= _ENDING:
      raised = time.monotonic()
      raise KeyboardInterrupt

  # Only the main thread may set handlers; elsewhere signals keep their meaning.
  in_main = threading.current_thread() is threading.main_thread()
  before = {number: signal.signal(number, interrupt) for number in _SIGNALS} if in_main else {}
  try:
    yield
    if in_main:
      check()  # nothing looked since
  except KeyboardInterrupt:
    out = sys.stderr if stream is None else stream
    print("\ninterrupted; run the same command to resume", file=out, flush=True)
    raise SystemExit(INTERRUPTED) from None
  finally:
    for number, handler in before.items():
      # None: a handler that was not set from Python, which cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if in_main:
      _arrived.clear()


def quiet(function: Callable[P, R]) -> Callable[P, R]:
  """Lets Ctrl-C end a function with a traceback that holds no frame below it."""

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> R:
    try:
      return function(*args, **kwargs)
    except KeyboardInterrupt:
      pass
    raise KeyboardInterrupt(f"{function.__name__} was interrupted")

  return call
