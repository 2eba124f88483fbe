"""Environment, memory, interruption and the compilation cache."""

import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys

import pytest

from flexiq_jax.runs import process


def test_describe():
  facts = process.describe()
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
  assert process.git_commit(file) is None  # no repository
  git("init")
  assert process.git_commit(file) is None  # not tracked
  git("add", "package.py")
  git("commit", "-m", "first")
  commit = process.git_commit(file)
  assert re.fullmatch("[0-9a-f]{12}", commit)
  (tmp_path / "installed.py").write_text("")
  assert process.git_commit(tmp_path / "installed.py") is None
  file.write_text("2")
  assert process.git_commit(file) == f"{commit}+changes"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory_is_in_bytes():
  status = pathlib.Path("/proc/self/status").read_text()
  kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
  assert process.peak_memory()["host"] == pytest.approx(kib * 1024, rel=0.1)


def test_peak_memory_takes_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, peak):
      self.peak = peak

    def memory_stats(self):
      return self.peak and {"peak_bytes_in_use": self.peak}

  monkeypatch.setattr(process.jax, "local_devices", lambda: [Device(None), Device(5), Device(7)])
  assert process.peak_memory()["device"] == 7
  monkeypatch.setattr(process.jax, "local_devices", lambda: [Device(None)])
  assert "device" not in process.peak_memory()


_FAULTS = """
import resource, sys, jax, jax.numpy as jnp
from flexiq_jax.runs import process
if sys.argv[1] == "keep":
  process.keep_memory()
def loss(w, x):
  for v in w:
    x = jnp.tanh(x @ v)
  return jnp.square(x).mean()
# Every layer's input is kept for the way back: temporaries of 48 MiB.
f = jax.jit(jax.grad(loss))
w, x = [jnp.ones((32, 32))] * 12, jnp.ones((2**15, 32))
for i in range(16):
  f(w, x)[0].block_until_ready()
  if i == 5:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again():
  plain = {
    name: value
    for name, value in os.environ.items()
    if name != "GLIBC_TUNABLES" and not name.startswith("MALLOC_")
  }

  def pages(way, **variables):
    """That the system had to give, in ten calls of a program."""
    command = (sys.executable, "-c", _FAULTS, way)
    done = subprocess.run(command, env=plain | variables, check=True, capture_output=True)
    return int(done.stdout)

  given_back = pages("leave")
  assert pages("keep") < given_back / 2
  # What the environment says has precedence.
  assert pages("keep", MALLOC_ARENA_MAX="4") > given_back / 2


_COMPILE = """
import sys, jax
from flexiq_jax.runs import process
process.enable_compilation_cache(sys.argv[1])
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
      cwd=pathlib.Path(__file__).parents[2],
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
    process.enable_compilation_cache(tmp_path / "file")


def test_no_compilation_cache_changes_nothing():
  before = process.jax.config.jax_compilation_cache_dir
  process.enable_compilation_cache(None)
  process.enable_compilation_cache("")
  assert process.jax.config.jax_compilation_cache_dir == before
