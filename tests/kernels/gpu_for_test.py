"""What tests of the GPU kernel need: JAX's interpreter, a compiler without a GPU, or a GPU.

The interpreter is private to JAX: all contact with it is here.
"""

import importlib
import os
from typing import Any

import jax
import pytest
from jax.experimental import topologies

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


# The facts of an H100 (SXM) that XLA asks for when it compiles without one.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84978434048 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""


def described_h100() -> jax.sharding.Sharding:
  """A place on an H100 that need not exist, for compiling; skips without XLA's CUDA plugin."""
  try:
    h100 = topologies.get_topology_desc("", platform="cuda", target_config=_H100, topology="1x1x1")
  except (NotImplementedError, RuntimeError) as error:
    pytest.skip(f"needs jax[cuda12] and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 to compile: {error}")
  return jax.sharding.SingleDeviceSharding(h100.devices[0])
