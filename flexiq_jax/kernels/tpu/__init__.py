"""The mixed matmul on TPUs, a Pallas kernel for Mosaic."""

from flexiq_jax.kernels.tpu import epilogues, prepare, sweeps, tiling, windows
from flexiq_jax.kernels.tpu.matmul import device_kind, mixed_matmul
from flexiq_jax.kernels.tpu.tiling import Tiles, choose_tiles

__all__ = [
  "Tiles",
  "choose_tiles",
  "device_kind",
  "epilogues",
  "mixed_matmul",
  "prepare",
  "sweeps",
  "tiling",
  "windows",
]
