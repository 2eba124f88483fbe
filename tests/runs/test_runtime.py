"""Progress, environment, memory, interruption and the compilation cache."""

import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from flexiq_jax.runs import runtime


class Clock:
  """A clock that goes on by hand, seconds."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_progress_is_bounded():
  clock, stream = Clock(), io.StringIO()
  with runtime.Progress("search", 100, interval=10, stream=stream, clock=clock) as progress:
    for step in range(100):
      clock.now += 0.5
      progress.update(note=f"best {step}")
  assert stream.getvalue().split("\n") == [
    "search: 1/100, 0.5 s, about 49.5 s left, best 0",
    "search: 21/100, 10.5 s, about 39.5 s left, best 20",
    "search: 41/100, 20.5 s, about 29.5 s left, best 40",
    "search: 61/100, 30.5 s, about 19.5 s left, best 60",
    "search: 81/100, 40.5 s, about 9.5 s left, best 80",
    "search: 100/100, 50.0 s, best 99",
    "",
  ]


def test_plain_progress_without_a_total_ends_with_the_count():
  clock, stream = Clock(), io.StringIO()
  with runtime.Progress("read", stream=stream, clock=clock) as progress:
    for _ in range(3):
      progress.update(steps=5)
  assert stream.getvalue() == "read: 5, 0.0 s\nread: 15, 0.0 s\n"


def test_plain_progress_says_where_it_stopped():
  clock, stream = Clock(), io.StringIO()
  with (
    pytest.raises(KeyboardInterrupt),
    runtime.Progress("eval", 9, stream=stream, clock=clock) as progress,
  ):
    progress.update()
    progress.update()
    raise KeyboardInterrupt
  assert stream.getvalue().endswith("eval: stopped at 2/9, 0.0 s\n")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream = Terminal()
  with runtime.Progress("search", 3, stream=stream) as progress:
    progress.update(3, note="[/x] 0.5")
  shown = stream.getvalue()
  assert "━" in shown and "3/3" in shown and "[/x] 0.5" in shown
  assert "search: " not in shown


def test_track_counts_items(capsys):
  assert list(runtime.track([3, 4], "eval")) == [3, 4]
  assert re.fullmatch(r"eval: 1/2, .*\neval: 2/2, .*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0.0 s"),
    (59.9, "59.9 s"),
    (59.96, "1 min 00 s"),
    (245, "4 min 05 s"),
    (3599.6, "1 h 00 min"),
    (7620, "2 h 07 min"),
  ],
)
def test_duration(seconds, text):
  assert runtime.duration(seconds) == text


def test_describe():
  facts = runtime.describe()
  assert facts["backend"] == "cpu" and facts["device_count"] >= 1
  assert facts["python"].startswith("3.") and facts["cpus"] >= 1
  for name in ("jax", "jaxlib", "flax", "numpy"):
    assert re.match(r"\d+\.\d+", facts[name])
  assert socket.gethostname() not in str(facts)
  assert str(pathlib.Path.home()) not in str(facts)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit(tmp_path):
  def git(*arguments):
    settings = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ("git", *settings, *arguments)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

  file = tmp_path / "package.py"
  file.write_text("1")
  assert runtime.git_commit(file) is None  # no repository
  git("init")
  assert runtime.git_commit(file) is None  # not tracked
  git("add", "package.py")
  git("commit", "-m", "first")
  commit = runtime.git_commit(file)
  assert re.fullmatch("[0-9a-f]{12}", commit)
  (tmp_path / "installed.py").write_text("")
  assert runtime.git_commit(tmp_path / "installed.py") is None
  file.write_text("2")
  assert runtime.git_commit(file) == f"{commit}+changes"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory_is_in_bytes():
  status = pathlib.Path("/proc/self/status").read_text()
  kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
  assert runtime.peak_memory()["host"] == pytest.approx(kib * 1024, rel=0.1)


def test_peak_memory_takes_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, peak):
      self.peak = peak

    def memory_stats(self):
      return self.peak and {"peak_bytes_in_use": self.peak}

  monkeypatch.setattr(runtime.jax, "local_devices", lambda: [Device(None), Device(5), Device(7)])
  assert runtime.peak_memory()["device"] == 7
  monkeypatch.setattr(runtime.jax, "local_devices", lambda: [Device(None)])
  assert "device" not in runtime.peak_memory()


def test_sigterm_stops_in_order():
  stream, steps = io.StringIO(), []
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stop, runtime.interruptible(stream):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      steps.append("not reached")
    finally:
      steps.append("cleaned up")
  assert stop.value.code == 130
  assert steps == ["cleaned up"]
  assert stream.getvalue() == "\ninterrupted; run the same command to resume\n"
  assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_stops_in_order():
  with pytest.raises(SystemExit) as stop, runtime.interruptible(io.StringIO()):
    raise KeyboardInterrupt
  assert stop.value.code == 130


def test_interruptible_lets_results_and_errors_pass():
  before = signal.getsignal(signal.SIGTERM)
  with runtime.interruptible():
    assert signal.getsignal(signal.SIGTERM) is not before
  with pytest.raises(ZeroDivisionError), runtime.interruptible():
    _ = 1 / 0
  assert signal.getsignal(signal.SIGTERM) is before


def test_interruptible_works_in_other_threads():
  ran = []

  def work():
    with runtime.interruptible():
      ran.append(True)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert ran


_COMPILE = """
import sys, jax
from flexiq_jax import runtime
runtime.enable_compilation_cache(sys.argv[1])
def f(x):
  for _ in range(60):
    x = jax.numpy.tanh(x @ x) + jax.numpy.sort(x, axis=0)
  return x
jax.jit(f)(jax.numpy.eye(4)).block_until_ready()
"""


def test_compilation_cache_is_filled_once(tmp_path):
  folder = tmp_path / "cache"
  written = []
  for _ in range(2):
    subprocess.run(
      (sys.executable, "-c", _COMPILE, str(folder)),
      cwd=pathlib.Path(__file__).parent.parent.parent,
      check=True,
      timeout=120,
      capture_output=True,
    )
    # Only of f: whether a smaller program is slow enough to be kept depends on the machine's load.
    written.append({p: p.stat().st_ino for p in folder.glob("jit_f-*-cache")})
  assert len(written[0]) == 1
  assert written[0] == written[1]


def test_compilation_cache_refuses_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"compilation cache '.*file' cannot be made"):
    runtime.enable_compilation_cache(tmp_path / "file")


def test_no_compilation_cache_changes_nothing():
  before = runtime.jax.config.jax_compilation_cache_dir
  runtime.enable_compilation_cache(None)
  runtime.enable_compilation_cache("")
  assert runtime.jax.config.jax_compilation_cache_dir == before
