"""Settings and fixtures shared by all tests."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool: the interpreter of GPU kernels blocks one for each warpgroup.
os.environ.setdefault("NPROC", str(max(6, os.cpu_count() or 1)))

# XLA's CUDA plugin (see pyproject.toml) is there to compile, and finds no GPU.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# Many tests compile the same programs: the workers of a session, and the processes that tests
# start, share them. The first process to be here makes the folder, the others inherit its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix="flexiq-compiled-")  # gone with this process
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Most of the time of tests goes into compiling small programs for the CPU, which run once: with the
# first of LLVM's levels that is a fifth less. Without any, sums and products would not be fused as
# in a run, and less would be said by equal bits.
if os.environ["JAX_PLATFORMS"] == "cpu":
  _level = "--xla_backend_optimization_level=1"
  os.environ["XLA_FLAGS"] = f"{_level} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import pytest

try:
  import hypothesis
except ImportError:  # the tests that run on a lent accelerator do without
  pass
else:
  # How long an example takes says more of the machine than of the code.
  hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
  )
  hypothesis.settings.load_profile("patient")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Programs for described devices are not shared: no client could read them back."""
  if item.get_closest_marker("aot") is None:
    return (yield)
  name = "jax_persistent_cache_min_compile_time_secs"
  before = jax.config.values[name]
  jax.config.update(name, 1e9)
  try:
    return (yield)
  finally:
    jax.config.update(name, before)


@pytest.fixture
def flexiq_data() -> pathlib.Path:
  """Folder of pretrained weights and labelled images; skips where there is none."""
  root = os.environ.get("FLEXIQ_DATA")
  if not root:
    pytest.skip("the environment variable FLEXIQ_DATA is not set")
  return pathlib.Path(root)
