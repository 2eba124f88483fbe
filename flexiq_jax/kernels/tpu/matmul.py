"""The mixed matmul on a TPU (Mosaic): int4 and int8 products on the matrix unit, in one pass.

The grid walks over tiles of rows and of outputs. A tile's sum is a loop over blocks of K: first
those in 4 bits, then those in 8, with an int32 accumulator in VMEM; the block that holds the
boundary is met by both, each finding the other's entries zero. Both trip counts are read at run
time, so a new boundary costs no compilation.

The layer's weights stay in VMEM from the first tile to the last. They and the activations are
fetched by hand, block by block, because only so the precision that a block does not use is never
read: the bytes follow the boundary, too.

The body of the kernel is in `kernel.py`, what a tile's sums become in `epilogues.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels import operands
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights
from flexiq_jax.kernels.tpu import epilogues, kernel, pixels, windows
from flexiq_jax.kernels.tpu.sweeps import Sweep
from flexiq_jax.kernels.tpu.tiling import (
  ROWS,
  Tiles,
  check_tiles,
  check_window,
  choose_tiles,
  memory,
  up,
  wide,
)
from flexiq_jax.kernels.windows import Window

Array = Any
PORTABLE = "TPU v5"  # tiles for it every generation takes


def mixed_matmul(
  x: Activations,
  w: Weights,
  epilogue: Epilogue,
  window: Window | None = None,
  *,
  tiles: Tiles | None = None,
  kind: str | None = None,
  interpret: bool = False,
) -> Array | Activations:
  """See `api.mixed_matmul`, also for `kind`.

  Any M and N: rows are padded to a multiple of 64 and outputs to one of 128 here, which copies;
  weights that are padded when they are packed, and batches that give such an M, are not copied.

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128, a layer whose weights do
      not fit into VMEM, or images of a size that no tile fits.
  """
  m, (k, n) = x.x8.shape[0], w.w8.shape
  kind = kind or device_kind()
  granule = 0 if epilogue.requantize is None else epilogue.requantize.granule
  tiles = tiles or choose_tiles(m, k, n, w.block, kind, window, granule, w.copies)
  if window is not None:
    check_window(tiles, m, w.block, window, w.copies)
  check_tiles(tiles, k, w.block)
  shift = w.w_shift if x.row_shift is not None else operands.total_shift(w)
  offsets = None
  if x.row_shift is not None and w.offset:
    offsets = operands.low_offsets(w, x.boundary)
  rows, columns = up(m, ROWS), up(n, tiles.n)
  pad_n = functools.partial(_pad, axis=-1, size=columns)
  requantize = epilogue.requantize
  vectors = epilogues.vectors(epilogue, wide(kind)) | {"shift": shift}
  if offsets is not None:
    vectors["offsets"] = offsets
  sweep = Sweep(
    shape=(rows, k, columns),
    tiles=tiles,
    block=w.block,
    activation=epilogue.activation,
    out=epilogue.out,
    signed=None if requantize is None else requantize.signed,
    granule=granule,
    dynamic=x.row_shift is not None,
    vectors=tuple((name, len(vectors[name])) for name in sorted(vectors)),
    interpret=interpret,
    window=window,
    copies=w.copies,
    unsigned=bool(w.offset),
    wide=wide(kind),
  )
  held, room = sweep.vmem + sweep.spilled, memory(kind)
  if held > room:
    raise NotImplementedError(
      f"tiles: {tiles.m} x {tiles.n} and weights of K = {k} and N = {columns} take "
      f"{held / 2**20:.0f} MiB on the chip, a {kind} has {room >> 20}; use smaller tiles"
    )
  # Beyond K there is nothing to fetch: a boundary that is wrong must not reach other memory.
  boundary = jnp.clip(x.boundary, 0, k // w.steps)
  scalars = jnp.stack([boundary, jnp.int32(0) if requantize is None else requantize.boundary])
  shape = pixels.shape(sweep) if sweep.innermost else (rows, k // w.steps)
  y = _build(sweep)(
    scalars,
    _pad(x.x4, 0, rows).reshape(shape),
    _pad(x.x8, 0, rows).reshape(shape),
    pad_n(w.w4),
    pad_n(w.w8),
    *([] if window is None or sweep.innermost else windows.masks(sweep)),
    *([_pad(x.row_shift, 0, rows)] if x.row_shift is not None else []),
    *(pad_n(vectors[name]) for name in sorted(vectors)),
  )
  if requantize is None:
    return y[0][:m, :n]
  return Activations(x8=y[0][:m, :n], x4=y[1][:m, :n], boundary=requantize.boundary)


@functools.lru_cache
def _build(sweep: Sweep):
  """The pallas_call for one set of static facts."""
  (m, k, n), tiles = sweep.shape, sweep.tiles
  column = lambda i, j, *_: (0, j)
  vectors = [pl.BlockSpec((size, tiles.n), column) for _, size in sweep.vectors]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  rows = [pl.BlockSpec((tiles.m, k // sweep.block), lambda i, j, *_: (i, 0))] * sweep.dynamic
  if sweep.signed is None:
    outs = [(sweep.out, lambda i, j, _: (i, j))]
  else:
    outs = [
      ("int8", lambda i, j, scalars: (i, sweep.high_column(j, scalars[1]))),
      ("int4", lambda i, j, scalars: (i, sweep.low_column(j, scalars[1]))),
    ]
  masks, unfolding = [], []
  if sweep.window is None:
    slots = (2, sweep.blocks, tiles.m, tiles.k)
  elif sweep.innermost:
    slots = (2, sweep.blocks, *sweep.bordered, sweep.window.images, sweep.columns)
  else:
    slots = (2, sweep.blocks, tiles.m + 2 * sweep.margin, sweep.columns)
    masks = windows.mask_specs(sweep)
    unfolding = [pltpu.VMEM(windows.words_shape(sweep), jnp.int32)]
  return pl.pallas_call(
    functools.partial(kernel.kernel, sweep),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=sweep.grid,
      in_specs=[anywhere] * 4 + masks + rows + vectors,
      out_specs=[pl.BlockSpec((tiles.m, tiles.n), index) for _, index in outs],
      scratch_shapes=[
        pltpu.VMEM(slots, jnp.int4),
        pltpu.VMEM(slots, jnp.int8),
        pltpu.VMEM((sweep.blocks, tiles.k // 2, n), jnp.int8),
        pltpu.VMEM((sweep.blocks, tiles.k, n), jnp.int8),
        pltpu.VMEM((tiles.m, tiles.n), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2, sweep.blocks)),
        pltpu.SemaphoreType.DMA((2, sweep.blocks)),
        *unfolding,
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct((m, n), dtype) for dtype, _ in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=sweep.vmem + sweep.spilled
    ),
    interpret=sweep.interpret,
    name="mixed_matmul",
  )


def device_kind() -> str:
  """The TPU that tiles are chosen for: the present one; `PORTABLE` where there is none."""
  device = jax.devices()[0]
  return device.device_kind if device.platform == "tpu" else PORTABLE


def _pad(a: Array, axis: int, size: int) -> Array:
  if a.shape[axis] == size:
    return a
  widths = [(0, 0)] * a.ndim
  widths[axis] = (0, size - a.shape[axis])
  return jnp.pad(a, widths)
