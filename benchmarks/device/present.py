"""The device that a step runs on."""

from typing import Any

import jax

from benchmarks.device.context import Context


def device(context: Context) -> Any:
  """JAX's first device.

  Raises:
    RuntimeError: it is not of the kind that the driver found: JAX may fall back to the CPU without
      a word, and full sizes would then take the time of all other steps.
  """
  found = jax.devices()[0]
  expected = context.earlier("machine").get("platform", found.platform)
  if found.platform != expected:
    raise RuntimeError(f"JAX runs on {found.platform} here; the driver found a {expected}")
  return found
