"""The mixed 4/8-bit matmul: a reference and kernels for TPU and GPU behind one function."""

from flexiq_jax.kernels.api import mixed_matmul
from flexiq_jax.kernels.lower import quantize_lower
from flexiq_jax.kernels.operands import Activations, Epilogue, Requantize, Weights
from flexiq_jax.kernels.packing import pack, unpack

__all__ = [
  "Activations",
  "Epilogue",
  "Requantize",
  "Weights",
  "mixed_matmul",
  "pack",
  "quantize_lower",
  "unpack",
]
