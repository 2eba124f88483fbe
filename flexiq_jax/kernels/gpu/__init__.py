"""The mixed matmul on Hopper GPUs, a Pallas kernel for Mosaic GPU."""

from flexiq_jax.kernels.gpu.matmul import GpuWeights, mixed_matmul, prepare
from flexiq_jax.kernels.gpu.tiling import SHARED, STRIP, Tiles, choose_tiles

__all__ = [
  "SHARED",
  "STRIP",
  "GpuWeights",
  "Tiles",
  "choose_tiles",
  "mixed_matmul",
  "prepare",
]
