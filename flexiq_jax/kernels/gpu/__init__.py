"""The mixed matmul on Hopper GPUs, a Pallas kernel for Mosaic GPU."""

from flexiq_jax.kernels.gpu import hopper, tiling
from flexiq_jax.kernels.gpu.matmul import GpuWeights, mixed_matmul, prepare

__all__ = ["GpuWeights", "hopper", "mixed_matmul", "prepare", "tiling"]
