"""Accelerators that need not exist: XLA compiles for their descriptions on any Linux machine.

TPUs need libtpu; GPUs need XLA's CUDA plugin and NVIDIA's assembler, which `make test` installs
into a folder of their own (see Makefile).
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

# What XLA asks of a GPU that it compiles for, from NVIDIA's data sheets and programming guide.
_GPU = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_core} l2_cache_size: {l2}
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
"""
_GPUS: dict[str, dict[str, Any]] = {
  "h100": {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "features": "feature_extension: ACCELERATED_FEATURES",
    **{"cores": 132, "fpus": 128, "clock": 1.98, "threads": 2048},
    **{"shared": 232448, "shared_core": 233472, "l2": 52428800},
    **{"memory": 84978434048, "bandwidth": 3352320000000},
  },
  "a100": {
    "name": "NVIDIA A100-SXM4-80GB",
    "major": 8,
    "minor": 0,
    "features": "",
    **{"cores": 108, "fpus": 64, "clock": 1.41, "threads": 2048},
    **{"shared": 166912, "shared_core": 167936, "l2": 41943040},
    **{"memory": 85899345920, "bandwidth": 2039000000000},
  },
  "a6000": {
    "name": "NVIDIA RTX A6000",
    "major": 8,
    "minor": 6,
    "features": "",
    **{"cores": 84, "fpus": 128, "clock": 1.8, "threads": 1536},
    **{"shared": 101376, "shared_core": 102400, "l2": 6291456},
    **{"memory": 51539607552, "bandwidth": 768000000000},
  },
}
_TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
NAMES = (*_GPUS, *_TPUS)


@dataclasses.dataclass(frozen=True)
class Target:
  """An accelerator to compile for.

  Attributes:
    name: one of `NAMES`.
    devices: four described devices of one host.
  """

  name: str
  devices: tuple[Any, ...]

  @property
  def platform(self) -> str:
    return "gpu" if self.name in _GPUS else "tpu"

  @property
  def kind(self) -> str:
    """As `jax.Device.device_kind` has it."""
    return self.devices[0].device_kind

  @property
  def options(self) -> dict[str, Any]:
    """Options of the compiler.

    Where it cannot measure, XLA takes one tiling of its own for every matrix product on a GPU, and
    fails where that one does not fit the shape. On a device it tries others and the vendor's
    library, which takes all. Here the library has to do. Programs are optimized as those of a run
    are, whatever the tests do with their own.
    """
    options = {"xla_gpu_enable_triton_gemm": False, "xla_backend_optimization_level": 3}
    return options if self.platform == "gpu" else {}

  @property
  def legality(self) -> dict[str, Any]:
    """Options where it counts that a program compiles, and not what becomes of it: a fifth less.

    All of XLA's own passes run; LLVM's and the assembler's optimizations do not.
    """
    options = {"xla_backend_optimization_level": 0, "xla_gpu_disable_gpuasm_optimizations": True}
    return self.options | options if self.platform == "gpu" else {}

  @property
  def sharding(self) -> SingleDeviceSharding:
    return SingleDeviceSharding(self.devices[0])

  def mesh(self, axis: str) -> Mesh:
    """All four devices along one axis."""
    return Mesh(np.array(self.devices), (axis,))

  def placed(self, tree: Any, sharding: Any = None) -> Any:
    """Shapes of arrays, on the accelerator; other leaves as they are."""

    def place(leaf):
      if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or self.sharding)

    return jax.tree.map(place, tree)


@functools.cache
def get(name: str) -> Target:
  """A target by its name; skips the test where there is no compiler for it."""
  if name in _TPUS:
    # Two processes may compile at once, and no host needs to be asked.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return Target(name, _topology("libtpu", platform="tpu", topology_name=_TPUS[name]))
  config = _GPU.format(**_GPUS[name])
  options = {"target_config": config, "topology": "1x1x4"}
  return Target(name, _topology("XLA's CUDA plugin", "", platform="cuda", **options))


def _topology(needs: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
  try:
    return tuple(topologies.get_topology_desc(*arguments, **options).devices[:4])
  except (NotImplementedError, RuntimeError) as error:
    pytest.skip(f"needs {needs} to compile: {error}")
