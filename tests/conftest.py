"""Settings and fixtures shared by all tests."""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool: the interpreter of GPU kernels blocks one for each warpgroup.
os.environ.setdefault("NPROC", str(max(6, os.cpu_count() or 1)))

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# XLA's CUDA plugin compiles for GPUs that are not here. It lies in a folder of its own (see
# Makefile), because where it finds no driver it complains in every other program. JAX looks for it
# when the first array is made.
_COMPILER = pathlib.Path(__file__).parent.parent / ".gpu-compiler"
if _COMPILER.is_dir():
  sys.path.append(str(_COMPILER))
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@pytest.fixture
def flexiq_data() -> pathlib.Path:
  """Folder of pretrained weights and labelled images; skips where there is none."""
  root = os.environ.get("FLEXIQ_DATA")
  if not root:
    pytest.skip("the environment variable FLEXIQ_DATA is not set")
  return pathlib.Path(root)
