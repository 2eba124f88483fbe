"""The device and the versions of everything that computes on it."""

import os
from importlib import metadata
from typing import Any

import jax

from benchmarks.device.context import Context
from flexiq_jax.runs import process

PACKAGES = (
  "jax-cuda13-plugin",
  "jax-cuda12-plugin",
  "libtpu",
  "torch",
  "triton",
  "ml-collections",
  "optax",
  "orbax-checkpoint",
)


def run(context: Context) -> dict[str, Any]:
  """Facts of the machine, without names of users, hosts or folders."""
  del context
  device = jax.devices()[0]
  found: dict[str, Any] = {"platform": device.platform, **process.describe()}
  found["memory_bytes"] = (device.memory_stats() or {}).get("bytes_limit")
  found["compute_capability"] = str(getattr(device, "compute_capability", ""))
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = None
  return found | {"load": os.getloadavg()[0]}
