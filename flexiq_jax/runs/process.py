"""The process of a run: environment, memory, interruption, precision, the compilation cache."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

# What compiles faster is not kept. JAX's default, a second, skips most of a small model.
_LEAST_SECONDS = 0.1
# Parameters of glibc's mallopt as malloc.h numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


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


def full_precision() -> None:
  """Makes float32 products of models really float32, where nobody has chosen a precision.

  By default accelerators multiply float32 in bfloat16 (TPUs) or TensorFloat-32 (NVIDIA GPUs); the
  accuracy of the float model, and of attention in any model, would then be that of those formats.
  JAX's own setting (`JAX_DEFAULT_MATMUL_PRECISION`) has precedence.
  """
  if jax.config.values["jax_default_matmul_precision"] is None:
    jax.config.update("jax_default_matmul_precision", "highest")


def keep_memory() -> None:
  """Keeps freed memory in this process, to be used again.

  XLA's CPU backend allocates the temporaries of a program at every call. glibc hands blocks of that
  size back to the system, which clears their pages anew each time. Call it before the first array
  is made. Another C library, or settings of malloc in the environment (`MALLOC_...`,
  `GLIBC_TUNABLES`), stay as they are.
  """
  if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
    return
  if platform.libc_ver()[0] != "glibc":
    return
  libc = ctypes.CDLL(None)
  libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
  libc.mallopt(_M_MMAP_MAX, 0)
  libc.mallopt(_M_ARENA_MAX, 1)  # others than the first cannot hold blocks of that size


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
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def share_compilation_cache(directory: str | os.PathLike[str] | None) -> None:
  """Keeps those of the processes that this one starts, which inherit it; see the function above."""
  if directory:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(directory)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(_LEAST_SECONDS)
