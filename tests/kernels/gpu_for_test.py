"""JAX's interpreter of Mosaic GPU kernels, which is private: all of our contact with it."""

import importlib
from typing import Any

import pytest


def interpreter() -> Any:
  """Parameters that make a GPU kernel run on a CPU, threads, barriers and copies included."""
  try:
    module = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    return module.InterpretGPUParams()
  except (ImportError, AttributeError):
    pytest.skip("this version of JAX has no interpreter of Mosaic GPU kernels where we look for it")
