"""`mixed_matmul`: one function in front of the kernels.

| implementation | runs on | how |
|---|---|---|
| `tpu` | TPU v5e, v5p, v6e, v7x | Mosaic: int8 and int4 products, unused precision never fetched |
| `gpu` | Hopper GPUs | Mosaic GPU: int8 wgmma, 4-bit weights read packed |
| `reference` | any backend | one int8 product in plain jnp |

Without a name the first one that the present backend can run is taken.
"""

from collections.abc import Callable
from typing import Any

import jax

from flexiq_jax.kernels import operands, reference
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights

Array = Any
IMPLEMENTATIONS = ("tpu", "gpu", "reference")


def mixed_matmul(
  x: Activations,
  w: Weights,
  epilogue: Epilogue,
  *,
  implementation: str | None = None,
  interpret: bool = False,
) -> Array | Activations:
  """Multiplies activations and weights whose first rows of K are in 4 bits, the rest in 8.

  Args:
    x: lowered activations `[M, K]`; any M.
    w: weights `[K, N]` in both precisions; any N, K a multiple of the shift block.
    epilogue: what follows the integer sum.
    implementation: a name of the table above; None chooses by the default backend.
    interpret: run a kernel in interpret mode, on a CPU.

  Returns:
    `[M, N]` of dtype `epilogue.out`; with `epilogue.requantize` the next layer's operands.

  Raises:
    ValueError: operands that do not belong together, or an unknown implementation.
    NotImplementedError: the named implementation cannot run here, or not these operands.
  """
  operands.check(x, w, epilogue)
  name = implementation or choose()
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation: {name!r} is not one of {', '.join(IMPLEMENTATIONS)}, or None"
    )
  if name == "reference":
    return reference.mixed_matmul(x, w, epilogue)
  backend = jax.default_backend()
  if not interpret and backend != name:
    raise NotImplementedError(
      f"implementation: {name!r} does not run on {backend}; use None, 'reference', or "
      "interpret=True"
    )
  return _kernel(name)(x, w, epilogue, interpret=interpret)


def choose() -> str:
  """The fastest implementation that the default backend can run."""
  if jax.default_backend() == "tpu" and supported_tpu(jax.devices()[0].device_kind):
    return "tpu"
  return "reference"


def supported_tpu(kind: str) -> bool:
  """Whether a TPU generation has int8 products (v4 and older do not)."""
  return not any(old in kind.lower() for old in ("v2", "v3", "v4"))


def _kernel(name: str) -> Callable[..., Any]:
  """Kernels are imported when they are used: each needs its backend's part of Pallas."""
  if name == "tpu":
    from flexiq_jax.kernels import tpu

    return tpu.mixed_matmul
  from flexiq_jax.kernels import gpu

  return gpu.mixed_matmul
