"""Settings and fixtures shared by all tests."""

import importlib.metadata
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

# Most of the time of tests goes into compiling small programs for the CPU, which run once. The
# first of LLVM's levels takes a fifth less of it. JAX 0.10 has an earlier emitter of fusions, too,
# which does without MLIR: another fifth less, and two thirds with no optimization (see OPTIMIZED).
if os.environ["JAX_PLATFORMS"] == "cpu":
  _quick = "--xla_backend_optimization_level=1"
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    _quick += " --xla_cpu_use_fusion_emitters=false"
  os.environ["XLA_FLAGS"] = f"{_quick} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import pytest

from tests.configured_for_test import configured

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

# Tests that compute for longer than they compile, as slow ones do. All others go without
# optimization, and so do the processes that they start.
OPTIMIZED = (
  *("experiments/", "models/test_pretrained.py", "runs/test_distributed.py"),
  *("search/gram/test_loop.py", "search/gram/test_surrogate.py", "search/test_run.py"),
  "search/test_fitness.py",  # expects a distance of exactly 0; without optimization it is 6e-16
)
# Tests that compare bits of programs that are fused differently. MLIR's emitter fuses sums and
# products as in a run only where LLVM optimizes; the earlier one without optimization never does.
if jax.__version_info__ >= (0, 11):
  OPTIMIZED += (
    *("deployment/", "finetuning/", "graph/", "orders/", "test_flexiq.py"),
    *("quant/test_lowering.py", "quant/test_rules.py", "quant/test_straight.py"),
  )


_optimized: bool | None = None  # how the programs in memory were compiled


def keep_apart(optimized: bool):
  """Forgets programs that were compiled in the other way.

  In memory JAX finds them by their function alone, and would take those of an earlier test. A run
  in this process and one in another then begin with initial weights that differ in their last bits.
  """
  global _optimized
  if _optimized not in (None, optimized):
    jax.clear_caches()
  _optimized = optimized


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Sets how programs of a test are compiled, those of its fixtures and processes with them."""
  path = item.path.relative_to(pathlib.Path(__file__).parent).as_posix()
  aot = item.get_closest_marker("aot")
  slow = item.get_closest_marker("slow") is not None
  optimized = jax.config.jax_platforms != "cpu" or path.startswith(OPTIMIZED) or slow
  keep_apart(optimized and not aot)
  if aot:
    # Programs for described devices are not shared: no client could read them back. What these
    # tests compute on the CPU is little; how devices' programs are made stands in their options.
    settings = {"persistent_cache_min_compile_time_secs": 1e9, "disable_most_optimizations": True}
    if aot.kwargs.get("legality_alone"):
      settings["exec_time_optimization_effort"] = -1.0  # half the time of compiling for a TPU
    with configured(**settings):
      return (yield)
  if optimized:
    return (yield)
  with configured(disable_most_optimizations=True), pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return (yield)


@pytest.fixture
def flexiq_data() -> pathlib.Path:
  """Folder of pretrained weights and labelled images; skips where there is none."""
  root = os.environ.get("FLEXIQ_DATA")
  if not root:
    pytest.skip("the environment variable FLEXIQ_DATA is not set")
  return pathlib.Path(root)
