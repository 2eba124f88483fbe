"""The mixed 4/8-bit matmul: a reference and kernels for TPU and GPU behind one function.

Code elsewhere may use these names and the modules `tpu`, `gpu`, `tile_files` and `tuning`, which
load their backend's part of Pallas.
"""

from flexiq_jax.kernels.api import choose_implementation, mixed_matmul, quantize_lower
from flexiq_jax.kernels.lower import finish, split_codes
from flexiq_jax.kernels.operands import (
  OUTPUTS,
  Activation,
  Activations,
  Epilogue,
  Requantize,
  Weights,
)
from flexiq_jax.kernels.packing import pack, unpack
from flexiq_jax.kernels.windows import Window

__all__ = [
  "OUTPUTS",
  "Activation",
  "Activations",
  "Epilogue",
  "Requantize",
  "Weights",
  "Window",
  "choose_implementation",
  "finish",
  "mixed_matmul",
  "pack",
  "quantize_lower",
  "split_codes",
  "unpack",
]
