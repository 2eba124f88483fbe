"""`mixed_matmul`: one function in front of the kernels.

| implementation | runs on | how |
|---|---|---|
| `tpu` | TPU v5e, v5p, v6e, v7x | Mosaic: int8 and int4 products, unused precision never fetched |
| `gpu` | Hopper GPUs | Mosaic GPU: int8 wgmma, 4-bit weights read packed |
| `reference` | any backend | one int8 product in plain jnp |

Where no implementation is named, the fastest that can run the layer is taken.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flexiq_jax.kernels import lower, operands, reference, tile_files, windows
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights
from flexiq_jax.kernels.windows import Window

Array = Any
IMPLEMENTATIONS = ("tpu", "gpu", "reference")


def mixed_matmul(
  x: Activations,
  w: Any,
  epilogue: Epilogue,
  *,
  window: Window | None = None,
  implementation: str | None = None,
  platform: str | None = None,
  kind: str | None = None,
  tuned: Mapping[tile_files.Shape, tile_files.Tiles] | None = None,
  interpret: Any = False,
) -> Array | Activations:
  """Multiplies activations and weights whose first rows of K are in 4 bits, the rest in 8.

  Args:
    x: lowered activations `[M, K]`; any M.
    w: weights `[K, N]` in both precisions; any N, K a multiple of the shift block. For `gpu` also
      what `gpu.prepare` made of them.
    epilogue: what follows the integer sum.
    window: of a convolution whose rows of x are pixels; None where x has all rows of K.
    implementation: a name of the table above; None chooses (see `choose_implementation`).
    platform: cpu, gpu or tpu, where the program is compiled or exported for a platform other than
      the present one; None is the default backend.
    kind: the TPU that a kernel is compiled for, as `jax.Device.device_kind` has it; None is the
      present one, and where there is none one whose tiles every generation takes.
    tuned: tiles measured on the device (`tile_files.read`); other shapes take tiles by rule, and
      the reference has none.
    interpret: run a kernel in interpret mode, on a CPU: True, or for `gpu` the parameters of JAX's
      interpreter.

  Returns:
    `[M, N]` of dtype `epilogue.out`; with `epilogue.requantize` the next layer's operands.

  Raises:
    ValueError: operands do not fit each other, the implementation is unknown, or the kind is none
      of a TPU.
    NotImplementedError: the named implementation cannot run here, or cannot take these operands.
  """
  platform = platform or jax.default_backend()
  name = implementation or choose_implementation(w, platform, kind)
  if isinstance(w, Weights):
    operands.check(x, w, epilogue)
    windows.check(x, w, window)
  elif name != "gpu":
    raise ValueError(f"w: laid out for the GPU kernel; {name!r} takes Weights")
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation: {name!r} is not one of {', '.join(IMPLEMENTATIONS)}, or None"
    )
  if name == "reference":
    return reference.mixed_matmul(x, w, epilogue, window)
  if not interpret and platform != name:
    raise NotImplementedError(
      f"implementation: {name!r} does not run on {platform}; use None, 'reference', or interpret"
    )
  kernel = functools.partial(_kernel(name), interpret=interpret) if interpret else _shared(name)
  if name == "tpu":
    if kind is not None and tile_files.implementation(kind) != "tpu":
      raise ValueError(f"kind: {kind!r} has no TPU kernel; one as 'TPU v6 lite' is accepted")
    kernel = functools.partial(kernel, kind=kind)
  if window is None:
    return kernel(x, w, epilogue, tiles=tile_files.choose(tuned, x, w))
  if name != "tpu":
    raise NotImplementedError(f"window: {name!r} takes patches; use 'tpu', 'reference', or None")
  return kernel(x, w, epilogue, window=window)


def quantize_lower(
  x: Array,
  scale: Array,
  shift: Array,
  boundary: Array,
  *,
  signed: bool,
  order: Array | None = None,
  granule: int = 0,
  implementation: str = "reference",
  interpret: Any = False,
) -> Activations:
  """Real activations -> operands of the mixed matmul (see `lower.quantize_lower`).

  On a TPU this is a kernel where channels and places fill whole registers.

  Args:
    x: float `[M, C]`.
    scale: float32 `[]`, activation scale.
    shift: int32 `[P]`, activation shift of each place.
    boundary: int32 `[]`, how many places are in 4 bits.
    signed: whether codes are signed.
    order: int32 `[P]`, the channel at each place, -1 for padding; None where x has the layout.
    granule: what the matmul reads at a time (see `operands.Requantize`); 0 writes all.
    implementation: of the matmul that follows.
    interpret: as for `mixed_matmul`.
  """
  if implementation != "tpu" or x.shape[1] % 128 or len(shift) % 128:
    return lower.quantize_lower(x, scale, shift, boundary, signed=signed, order=order)
  from flexiq_jax.kernels import tpu

  return tpu.quantize_lower(
    *(x, scale, shift, boundary),
    signed=signed,
    order=order,
    granule=granule,
    interpret=bool(interpret),
  )


def choose_implementation(w: Any, platform: str | None = None, kind: str | None = None) -> str:
  """The fastest implementation that is known to run a layer.

  Args:
    w: the layer's weights; kernels take shift blocks of whole register tiles only, the one for
      TPUs weights that fit on the chip.
    platform: cpu, gpu or tpu; None is the default backend. For a platform other than the present
      one, a device generation that has a kernel is assumed.
    kind: see `mixed_matmul`.
  """
  platform = platform or jax.default_backend()
  present = jax.devices()[0] if platform == jax.default_backend() else None
  if platform == "tpu" and w.block // w.steps % 128 == 0:
    from flexiq_jax.kernels import tpu

    kind = kind or tpu.device_kind()
    k, n = w.w8.shape
    known = tile_files.implementation(kind) == "tpu"
    return "tpu" if known and tpu.fits(k, n, kind) else "reference"
  if platform == "gpu" and w.block % 64 == 0 and w.taps == 1:
    hopper = present is None or getattr(present, "compute_capability", "") == "9.0"
    return "gpu" if hopper else "reference"
  return "reference"


@functools.cache
def _shared(name: str) -> Callable[..., Any]:
  """A kernel that is traced and lowered once for all layers of one shape in a program."""
  static = ("tiles", "window", "kind") if name == "tpu" else ("tiles",)
  return jax.jit(_kernel(name), static_argnames=static)


def _kernel(name: str) -> Callable[..., Any]:
  """Kernels are imported when they are used: each needs its backend's part of Pallas."""
  if name == "tpu":
    from flexiq_jax.kernels import tpu

    return tpu.mixed_matmul
  from flexiq_jax.kernels import gpu

  return gpu.mixed_matmul
