"""Brings weights into the order that a platform's kernel reads, once for all calls."""

import dataclasses

import jax

from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.deployment.model import Deployed
from flexiq_jax.kernels import choose_implementation


def place(
  deployed: Deployed, platform: str | None = None, implementation: str | None = None
) -> Deployed:
  """Lays the weights of a deployed model out for where it is to run.

  GPU kernels read weights in an order of their own; without this step every call would reorder
  them. Nothing changes for a CPU or a TPU.

  Args:
    deployed: the model, as it is kept.
    platform: cpu, gpu or tpu; None is the default backend.
    implementation: of the mixed matmul (see `kernels.mixed_matmul`); None chooses.

  Raises:
    ValueError: the platform is a GPU and the model was laid out for TPUs.
  """
  layers = {}
  for name, d in deployed.layers.items():
    if isinstance(d, Mixed) and (platform or jax.default_backend()) == "gpu" and d.slides:
      raise ValueError(
        f"deployed: layer {name} is laid out for TPUs, whose kernel slides its window; deploy with "
        "granule=64 for a GPU"
      )
    if (
      isinstance(d, Mixed)
      and (implementation or choose_implementation(d.weights, platform)) == "gpu"
    ):
      from flexiq_jax.kernels import gpu

      d = dataclasses.replace(d, weights=jax.jit(gpu.prepare)(d.weights))
    layers[name] = d
  return dataclasses.replace(deployed, layers=layers)
