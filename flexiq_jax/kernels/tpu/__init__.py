"""The mixed matmul on TPUs, a Pallas kernel for Mosaic."""

from flexiq_jax.kernels.tpu.epilogues import epilogue_rows
from flexiq_jax.kernels.tpu.matmul import device_kind, mixed_matmul
from flexiq_jax.kernels.tpu.prepare import quantize_lower
from flexiq_jax.kernels.tpu.sweeps import Sweep, Traffic, traffic
from flexiq_jax.kernels.tpu.tiling import (
  LANES,
  ROWS,
  Tiles,
  check_tiles,
  choose_tiles,
  fits,
  of_batch,
  tile_columns,
  up,
  wide,
  window_rows,
)
from flexiq_jax.kernels.tpu.windows import stage_rows

__all__ = [
  "LANES",
  "ROWS",
  "Sweep",
  "Tiles",
  "Traffic",
  "check_tiles",
  "choose_tiles",
  "device_kind",
  "epilogue_rows",
  "fits",
  "mixed_matmul",
  "of_batch",
  "quantize_lower",
  "stage_rows",
  "tile_columns",
  "traffic",
  "up",
  "wide",
  "window_rows",
]
