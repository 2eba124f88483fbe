"""Quantize, permute, lower and split on a TPU: the operands of a mixed matmul in one kernel.

XLA makes one loop of this step where channels keep their order. To gather them it transposes the
activations there and back. The matrix unit needs no such thing: 8-bit codes times a matrix that
holds one 1 per column are exactly the codes in another order.

    codes [m, C] int8  x  one-hot [C, n] int8  ->  permuted codes [m, n] int32

Each tile then writes the precision in use, as the epilogue of a producer would.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels.operands import Activations
from flexiq_jax.kernels.tpu import epilogues
from flexiq_jax.kernels.tpu.sweeps import Sweep
from flexiq_jax.kernels.tpu.tiling import LANES, Tiles, tile_columns, up
from flexiq_jax.quant import quantizer

Array = Any


def quantize_lower(
  x: Array,
  scale: Array,
  shift: Array,
  boundary: Array,
  *,
  signed: bool,
  order: Array | None = None,
  granule: int = 0,
  rows: int = 512,
  interpret: bool = False,
) -> Activations:
  """`lower.quantize_lower` as a kernel.

  Codes may differ from it by one where a value lies at the edge of two: the scale's inverse is
  multiplied with.

  Args:
    x: float32 or bfloat16 `[M, C]`.
    scale: float32 `[]`, activation scale.
    shift: int32 `[P]`, activation shift of each place.
    boundary: int32 `[]`, how many places are in 4 bits.
    signed: whether codes are signed.
    order: int32 `[P]`, the channel at each place, -1 for padding; None where x has the layout.
    granule: see `operands.Requantize`.
    rows: of a tile, a multiple of 64.
    interpret: run in interpret mode.

  Raises:
    NotImplementedError: C or P that is no multiple of 128.
  """
  (m, c), p = x.shape, len(shift)
  if c % LANES or p % LANES:
    raise NotImplementedError(
      f"x, shift: {c} channels and {p} places; the TPU kernel takes multiples of {LANES}"
    )
  lo = quantizer.code_range(8, signed)[0]
  vectors = epilogues.limits(shift, signed, lo)
  vectors = {name: vector[None] for name, vector in vectors.items()}
  if order is not None:
    vectors["order"] = order[None]
  names = tuple(sorted(vectors))
  tiles = Tiles(m=min(rows, up(m, 64)), n=tile_columns(p), k=LANES)
  sweep = Sweep(
    shape=(m, c, p),
    tiles=tiles,
    block=LANES,
    activation="none",
    out="int32",
    signed=signed,
    granule=granule,
    dynamic=False,
    vectors=tuple((name, 1) for name in names),
    interpret=interpret,
  )
  inverse = jnp.broadcast_to(1 / scale, (1, c))
  call = _build(sweep, order is not None)
  x8, x4 = call(jnp.clip(boundary, 0, p)[None], x, inverse, *(vectors[name] for name in names))
  return Activations(x8=x8, x4=x4, boundary=jnp.asarray(boundary, jnp.int32))


@functools.lru_cache
def _build(sweep: Sweep, permute: bool):
  (m, c, p), tiles = sweep.shape, sweep.tiles
  high = lambda i, j, scalars: (i, sweep.high_column(j, scalars[0]))
  low = lambda i, j, scalars: (i, sweep.low_column(j, scalars[0]))
  return pl.pallas_call(
    functools.partial(_kernel, sweep, permute),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(-(-m // tiles.m), p // tiles.n),
      in_specs=[
        pl.BlockSpec((tiles.m, c), lambda i, j, _: (i, 0)),
        pl.BlockSpec((1, c), lambda i, j, _: (0, 0)),
        *[pl.BlockSpec((1, tiles.n), lambda i, j, _: (0, j)) for _ in sweep.vectors],
      ],
      out_specs=[pl.BlockSpec((tiles.m, tiles.n), index) for index in (high, low)],
      scratch_shapes=[
        pltpu.VMEM((tiles.m, c), jnp.int8),
        pltpu.VMEM((p // tiles.n if permute else 1, c, tiles.n), jnp.int8),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct((m, p), dtype) for dtype in (jnp.int8, jnp.int4)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
    interpret=sweep.interpret,
    name="quantize_lower",
  )


def _kernel(sweep: Sweep, permute: bool, scalars, x, inverse, *refs):
  vectors = dict(zip((name for name, _ in sweep.vectors), refs, strict=False))
  out8, out4, codes, one_hot = refs[len(sweep.vectors) :]
  tiles, signed = sweep.tiles, bool(sweep.signed)
  i, j = pl.program_id(0), pl.program_id(1)
  offset = 0 if signed else 128
  lo, hi = quantizer.code_range(8, signed)

  @pl.when(j == 0)
  def _():
    def quantize(part):
      y = x[part].astype(jnp.float32) * inverse[...]
      code = epilogues.rounded(jnp.clip(y, float(lo), float(hi))) - offset
      codes[part] = code.astype(jnp.int8)

    epilogues.each(tiles.m, sweep.shape[1], quantize)

  if permute:

    @pl.when(i == 0)
    def _():
      channel = jax.lax.broadcasted_iota(jnp.int32, one_hot.shape[1:], 0)
      one_hot[j] = (channel == vectors["order"][...]).astype(jnp.int32).astype(jnp.int8)

  def steps(rows, columns):
    if not permute:
      first = pl.multiple_of(j * tiles.n + columns.start, LANES)
      code = codes[rows, pl.ds(first, columns.size)].astype(jnp.int32)
    else:
      code = jax.lax.dot_general(
        codes[rows],
        one_hot[j, :, columns],
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT,  # whatever JAX is set to: Mosaic refuses others
        preferred_element_type=jnp.int32,
      )
    return (code + offset).astype(jnp.float32)

  tile = epilogues.Tile(
    steps=steps,
    vectors=vectors,
    strip=sweep.strip,
    start=j * tiles.n,
    boundary=scalars[0],
    written=sweep.written(scalars[0]),
    least=lo,
    signed=signed,
  )
  epilogues.requantize(tile, out8, out4)
