"""What tests of the GPU kernel need: JAX's interpreter, which is private, or a real Hopper GPU.

All contact with the interpreter is here.
"""

import importlib
from typing import Any

import jax
import pytest

from flexiq_jax.kernels import tuning


def interpreter() -> Any:
  """Parameters that make a GPU kernel run on a CPU, threads, barriers and copies included."""
  try:
    module = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return module.InterpretGPUParams()
  except (ImportError, AttributeError):
    pytest.skip("this version of JAX has no interpreter of Mosaic GPU kernels where we look for it")


def require_hopper() -> None:
  """Skips where there is no Hopper GPU."""
  device = jax.devices()[0]
  if device.platform != "gpu" or tuning.implementation(device.device_kind) != "gpu":
    pytest.skip(f"needs a Hopper GPU; JAX runs on {device.device_kind}")
