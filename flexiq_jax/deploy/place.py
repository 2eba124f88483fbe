"""Weights as a platform's kernel wants them, once for all calls."""

import dataclasses

from flexiq_jax.deploy.layers import Mixed
from flexiq_jax.deploy.model import Deployed
from flexiq_jax.kernels import api, windows


def place(deployed: Deployed, platform: str | None = None) -> Deployed:
  """Lays the weights of a deployed model out for where it is to run.

  GPU kernels read them in another order than the one in which they are kept; without this step
  every call would bring them into it, and convolutions whose windows slide would run on the
  reference. Nothing changes for a CPU or a TPU.

  Args:
    deployed: the model, as it is kept.
    platform: cpu, gpu or tpu; None is the default backend.
  """
  layers = {}
  for name, d in deployed.layers.items():
    if isinstance(d, Mixed):
      weights = windows.by_channel(d.weights)
      if api.choose(weights, platform) == "gpu":
        from flexiq_jax.kernels import gpu  # only where it is used: it needs that part of Pallas

        d = dataclasses.replace(d, weights=gpu.prepare(weights))
    layers[name] = d
  return dataclasses.replace(deployed, layers=layers)
