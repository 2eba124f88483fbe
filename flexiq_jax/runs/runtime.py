"""What surrounds a run: progress, environment, memory, interruption, the compilation cache."""

import contextlib
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import jax
import rich.console
import rich.progress

T = TypeVar("T")

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C: 128 + SIGINT


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
  ):
    """Prepares the display; it starts with the `with` block.

    Args:
      description: name of the stage.
      total: number of steps, or None where it is not known.
      interval: least time between two plain lines, seconds.
      stream: where to write, standard output if None.
      clock: seconds, any origin.
    """
    self._description, self._total, self._interval = description, total, interval
    self._stream = sys.stdout if stream is None else stream
    self._clock = clock
    self._done, self._note = 0, ""
    self._bar: rich.progress.Progress | None = None
    self._task = rich.progress.TaskID(0)
    self._start = self._last = 0.0
    self._printed = -1  # the step of the latest plain line

  def __enter__(self) -> "Progress":
    self._start = self._clock()
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
    """
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


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
  """Yields the items and shows how far the loop over them is.

  Args:
    items: what to iterate over.
    description: name of the stage.
    total: number of items, `len(items)` if None and there is one.
  """
  if total is None and hasattr(items, "__len__"):
    total = len(items)  # pyrefly: ignore[bad-argument-type]
  with Progress(description, total) as progress:
    for item in items:
      yield item
      progress.update()


def duration(seconds: float) -> str:
  """A time span as `8.2 s`, `4 min 05 s` or `2 h 07 min`."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  whole = round(seconds)
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02d} s"
  minutes = round(seconds / 60)
  return f"{minutes // 60} h {minutes % 60:02d} min"


def describe() -> dict[str, Any]:
  """The environment of a result, without names of users, hosts or folders.

  Returns:
    `python`, `jax`, `jaxlib`, `flax` and `numpy` versions; `system` (as `Linux x86_64`); `cpus`
    that this process may use; `backend`, `device_kind`, `device_count`, `process_count`; and, in a
    git checkout of this project, `commit` with `+changes` where tracked files differ from it.
  """
  device = jax.devices()[0]
  facts = {
    "python": platform.python_version(),
    **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    "system": f"{platform.system()} {platform.machine()}",
    "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "backend": jax.default_backend(),
    "device_kind": device.device_kind,
    "device_count": jax.device_count(),
    "process_count": jax.process_count(),
  }
  commit = git_commit(Path(__file__))
  return facts | ({"commit": commit} if commit else {})


def git_commit(file: Path) -> str | None:
  """The commit that a tracked file is checked out from.

  Args:
    file: a file; one that git does not track has no commit, so that a package installed below some
      other repository does not claim that repository's.

  Returns:
    Twelve digits, followed by `+changes` where the work tree differs from the commit; None where
    there is no git, no repository or no commit.
  """

  def git(*arguments: str) -> str:
    return subprocess.run(
      ("git", *arguments),
      cwd=file.parent,
      check=True,
      capture_output=True,
      text=True,
      timeout=10,
    ).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", file.name)
    commit = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.SubprocessError):
    return None
  return commit + "+changes" * bool(changes)


def peak_memory() -> dict[str, int]:
  """The largest memory use of this process so far, bytes.

  Returns:
    `host`: peak resident set; `device`: peak of the fullest local device, absent where the backend
    keeps no count (CPU).
  """
  rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  peak = {"host": rss if sys.platform == "darwin" else rss * 1024}  # Linux counts in KiB
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  devices = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return peak | ({"device": max(devices)} if devices else {})


@contextlib.contextmanager
def interruptible(stream: TextIO | None = None) -> Iterator[None]:
  """Lets Ctrl-C and SIGTERM (as from SLURM) end the run in order, with exit status 130.

  SIGTERM raises KeyboardInterrupt, so that `with` and `finally` blocks of the current stage run.
  Python delivers a signal between bytecodes: a computation on the device finishes first.

  Args:
    stream: where the one line goes, standard error if None.

  Raises:
    SystemExit: with status 130, in place of KeyboardInterrupt.
  """

  def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

  # Only the main thread may set handlers; elsewhere SIGTERM keeps its meaning.
  in_main = threading.current_thread() is threading.main_thread()
  previous = signal.signal(signal.SIGTERM, interrupt) if in_main else None
  try:
    yield
  except KeyboardInterrupt:
    out = sys.stderr if stream is None else stream
    print("\ninterrupted; run the same command to resume", file=out, flush=True)
    raise SystemExit(INTERRUPTED) from None
  finally:
    if in_main:
      # None: a handler that was not set from Python, which cannot be put back.
      signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def full_precision() -> None:
  """Makes float32 products of models really float32, where nobody has chosen a precision.

  By default accelerators multiply float32 in bfloat16 (TPUs) or TensorFloat-32 (NVIDIA GPUs), which
  would be the float model's accuracy, and its attention's, of that. JAX's own setting
  (`JAX_DEFAULT_MATMUL_PRECISION`) goes before.
  """
  if jax.config.values["jax_default_matmul_precision"] is None:
    jax.config.update("jax_default_matmul_precision", "highest")


def enable_compilation_cache(directory: str | os.PathLike[str] | None) -> None:
  """Keeps compiled programs on disk, so that a second start need not compile them.

  Call it before the first compilation. See https://docs.jax.dev/en/latest/persistent_compilation_cache.html.

  Args:
    directory: folder of the cache, made where it is missing; None or "" leaves JAX as it is.

  Raises:
    ValueError: the folder cannot be made or written.
  """
  if not directory:
    return
  path = Path(directory)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"compilation cache {str(path)!r} cannot be made ({error.strerror}): name another folder"
    ) from error
  if not os.access(path, os.W_OK | os.X_OK):
    raise ValueError(f"compilation cache {str(path)!r} cannot be written: name another folder")
  jax.config.update("jax_compilation_cache_dir", str(path.resolve()))
  # The defaults skip what compiles within a second, which is most of a small model.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
