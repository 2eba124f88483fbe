"""What tests of the GPU kernel need: JAX's interpreter, or a GPU.

The interpreter is private to JAX: all contact with it is here.
"""

import importlib
import os
from typing import Any

import jax
import pytest

from flexiq_jax.kernels import tile_files


def interpreter(groups: int = 1) -> Any:
  """Parameters that make a GPU kernel run on a CPU, threads, barriers and copies included.

  Args:
    groups: warpgroups of the kernel that multiply. Each warpgroup, the copying one too, blocks a
      thread of XLA's pool, and so does the caller: with fewer threads the kernel may never end.
  """
  if (threads := int(os.environ.get("NPROC", 1))) < groups + 2:
    pytest.skip(f"JAX's interpreter needs NPROC={groups + 2} threads, there are {threads}")
  try:
    module = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return module.InterpretGPUParams()
  except (ImportError, AttributeError):
    pytest.skip("this version of JAX has no interpreter of Mosaic GPU kernels where we look for it")


def require_hopper() -> None:
  """Skips where there is no Hopper GPU."""
  device = jax.devices()[0]
  if device.platform != "gpu" or tile_files.implementation(device.device_kind) != "gpu":
    pytest.skip(f"needs a Hopper GPU; JAX runs on {device.device_kind}")
