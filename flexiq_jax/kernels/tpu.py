"""The mixed matmul on a TPU (Mosaic): int4 and int8 products on the matrix unit, in one pass.

The grid walks over tiles of rows and of outputs. A tile's sum is a loop over blocks of K: first
those in 4 bits, then those in 8, with an int32 accumulator in VMEM; the block that holds the
boundary is met by both, each finding the other's entries zero. Both trip counts are read at run
time, so a new boundary costs no compilation.

The layer's weights stay in VMEM from the first tile to the last. They and the activations are
fetched by hand, block by block, because only so the precision that a block does not use is never
read: the bytes follow the boundary, too.

What shapes the speed (v5e; `benchmarks/kernels.py` prints the schedules):

* The matrix unit takes 128 rows of K a pass in int8 and 256 in int4. Runs of K that share a shift
  must therefore be 256 long, or 4 bits gain nothing: `block_k` is a multiple of that where K is.
* Filling and draining the unit costs about 140 cycles a block, so tiles are large.
* Reading and writing the accumulator takes one store a register and pass, just hidden behind an
  int4 pass; the first block starts from the correction instead of zeroing it beforehand.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.kernels import operands, tpu_epilogue
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights

Array = Any
LANES = 128
ROWS = 64  # rows of an int4 register tile
VMEM = 100 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
  """Sizes of the kernel's blocks.

  Attributes:
    m: rows of a tile, a multiple of 64.
    n: outputs of a tile, a multiple of 128.
    k: rows of K in a block, a multiple of 128, and a multiple or a divisor of the shift block.
  """

  m: int
  n: int
  k: int

  def __post_init__(self):
    for field, granule in (("m", ROWS), ("n", LANES), ("k", LANES)):
      value = getattr(self, field)
      if value < granule or value % granule:
        raise ValueError(f"tiles.{field}: {value}; a positive multiple of {granule} is accepted")


def choose_tiles(m: int, k: int, n: int, block: int, kind: str = "TPU v5 lite") -> Tiles:
  """Tile sizes for a product of `[m, k]` and `[k, n]` with shift blocks of `block` rows.

  Args:
    m: rows of x.
    k: rows of w.
    n: outputs.
    block: rows of K in a shift block.
    kind: the device, as `jax.Device.device_kind` has it. A matrix unit of 256 x 256 (v6e, v7x)
      takes 512 rows of K a pass in int4; there the accumulator is what binds, and blocks are long.

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128.
  """
  if block % LANES or k % LANES:
    raise NotImplementedError(
      f"block, K: {block} and {k}; the TPU kernel takes multiples of {LANES} (see shift_block), "
      "the reference takes any"
    )
  long = () if "v5" in kind.lower() else (1536, 1024, 768, 512)
  fits = lambda t: k % t == 0 and (block % t == 0 or (t in (256, *long) and t % block == 0))
  block_k = next(t for t in (*long, 256, 384, 128) if fits(t))
  columns = _up(n, LANES)
  block_n = next(t for t in range(1152, 0, -LANES) if columns % t == 0)
  steps = -(-m // 1024)
  return Tiles(m=_up(-(-m // steps), ROWS), n=block_n, k=block_k)


def mixed_matmul(
  x: Activations,
  w: Weights,
  epilogue: Epilogue,
  *,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> Array | Activations:
  """See `api.mixed_matmul`.

  Any M and N: rows are padded to a multiple of 64 and outputs to one of 128 here, which copies;
  weights that are padded when they are packed, and batches that give such an M, are not copied.

  Raises:
    NotImplementedError: shift blocks or a K that are no multiples of 128, or a layer whose weights
      do not fit into VMEM.
  """
  (m, k), n = x.x8.shape, w.w8.shape[1]
  tiles = tiles or choose_tiles(m, k, n, w.block, _device_kind())
  _check_tiles(tiles, k, w.block)
  shift = w.w_shift if x.row_shift is not None else operands.total_shift(w)
  offsets = None
  if x.row_shift is not None and w.offset:
    offsets = operands.low_offsets(w, x.boundary)
  rows, columns = _up(m, ROWS), _up(n, tiles.n)
  pad_n = functools.partial(_pad, axis=-1, size=columns)
  requantize = epilogue.requantize
  vectors = tpu_epilogue.vectors(epilogue) | {"shift": shift}
  if offsets is not None:
    vectors["offsets"] = offsets
  call = _build(
    shape=(rows, k, columns),
    tiles=tiles,
    block=w.block,
    activation=epilogue.activation,
    out=epilogue.out,
    signed=None if requantize is None else requantize.signed,
    granule=0 if requantize is None else requantize.granule,
    dynamic=x.row_shift is not None,
    vectors=tuple((name, len(vectors[name])) for name in sorted(vectors)),
    interpret=interpret,
  )
  # Beyond K there is nothing to fetch: a boundary that is wrong must not reach other memory.
  boundary = jnp.clip(x.boundary, 0, k)
  scalars = jnp.stack([boundary, jnp.int32(0) if requantize is None else requantize.boundary])
  y = call(
    scalars,
    _pad(x.x4, 0, rows),
    _pad(x.x8, 0, rows),
    pad_n(w.w4),
    pad_n(w.w8),
    *([_pad(x.row_shift, 0, rows)] if x.row_shift is not None else []),
    *(pad_n(vectors[name]) for name in sorted(vectors)),
  )
  if requantize is None:
    return y[0][:m, :n]
  return Activations(x8=y[0][:m, :n], x4=y[1][:m, :n], boundary=requantize.boundary)


@functools.lru_cache
def _build(*, shape, tiles: Tiles, interpret: bool, **traits):
  """The pallas_call for one set of static facts."""
  m, k, n = shape
  plan = _Plan(shape=shape, tiles=tiles, interpret=interpret, **traits)
  column = lambda i, j, *_: (0, j)
  vectors = [pl.BlockSpec((size, tiles.n), column) for _, size in plan.vectors]
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  rows = [pl.BlockSpec((tiles.m, k // plan.block), lambda i, j, *_: (i, 0))] * plan.dynamic
  if plan.signed is None:
    outs = [(plan.out, lambda i, j, _: (i, j))]
  else:
    outs = [("int8", plan.high_tile), ("int4", plan.low_tile)]
  slots = (2, plan.blocks, tiles.m, tiles.k)
  return pl.pallas_call(
    functools.partial(_kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=plan.grid,
      in_specs=[anywhere] * 4 + rows + vectors,
      out_specs=[pl.BlockSpec((tiles.m, tiles.n), index) for _, index in outs],
      scratch_shapes=[
        pltpu.VMEM(slots, jnp.int4),
        pltpu.VMEM(slots, jnp.int8),
        pltpu.VMEM((plan.blocks, tiles.k // 2, n), jnp.int8),
        pltpu.VMEM((plan.blocks, tiles.k, n), jnp.int8),
        pltpu.VMEM((tiles.m, tiles.n), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2, plan.blocks)),
        pltpu.SemaphoreType.DMA((2, plan.blocks)),
      ],
    ),
    out_shape=[jax.ShapeDtypeStruct((m, n), dtype) for dtype, _ in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    interpret=interpret,
    name="mixed_matmul",
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Static facts of one kernel (see `mixed_matmul`); `signed` is None without requantizing."""

  shape: tuple[int, int, int]
  tiles: Tiles
  block: int
  activation: str
  out: str
  signed: bool | None
  granule: int
  dynamic: bool
  vectors: tuple[tuple[str, int], ...]
  interpret: bool

  @property
  def grid(self) -> tuple[int, int]:
    return -(-self.shape[0] // self.tiles.m), self.shape[2] // self.tiles.n

  @property
  def blocks(self) -> int:
    return self.shape[1] // self.tiles.k

  def written(self, boundary):
    """End of the outputs written in 4 bits, and start of those written in 8."""
    if not self.granule:
      return self.shape[2], 0
    g = self.granule
    return _div(boundary + g - 1, g) * g, _div(boundary, g) * g

  def low_tile(self, i, j, scalars):
    end, _ = self.written(scalars[1])
    return i, jnp.minimum(j, jnp.maximum(_div(end + self.tiles.n - 1, self.tiles.n) - 1, 0))

  def high_tile(self, i, j, scalars):
    _, start = self.written(scalars[1])
    return i, jnp.maximum(j, jnp.minimum(_div(start, self.tiles.n), self.grid[1] - 1))


def _kernel(plan: _Plan, scalars, x4_hbm, x8_hbm, w4_hbm, w8_hbm, *refs):
  tiles, (steps, _) = plan.tiles, plan.grid
  refs = list(refs)
  row_shift = refs.pop(0) if plan.dynamic else None
  vectors = {name: refs.pop(0) for name, _ in plan.vectors}
  *outs, x4, x8, w4, w8, acc, x_sems, w_sems = refs
  i, j = pl.program_id(0), pl.program_id(1)
  boundary = scalars[0]
  low_end, high_start = _div(boundary + tiles.k - 1, tiles.k), _div(boundary, tiles.k)
  # Precision -> its operands, its blocks of K, and how many rows of w one of K takes.
  sides = (
    (x4_hbm, x4, w4_hbm, w4, 0, low_end, 2),
    (x8_hbm, x8, w8_hbm, w8, high_start, plan.blocks, 1),
  )

  def copy_w(side, b):
    _, _, source, target, _, _, packed = sides[side]
    size = tiles.k // packed
    return pltpu.make_async_copy(
      source.at[pl.ds(pl.multiple_of(b * size, size), size)], target.at[b], w_sems.at[side, b]
    )

  def copy_x(side, step, b, act):
    """Starts a copy or waits for it; the last tile of rows may be short."""
    source, target = sides[side][:2]

    def of(size):
      rows = pl.ds(pl.multiple_of(step * tiles.m, ROWS), size)
      columns = pl.ds(pl.multiple_of(b * tiles.k, LANES), tiles.k)
      slot = jax.lax.rem(step, 2)
      act(
        pltpu.make_async_copy(
          source.at[rows, columns], target.at[slot, b, pl.ds(0, size)], x_sems.at[side, slot, b]
        )
      )

    short = plan.shape[0] - (steps - 1) * tiles.m
    if short == tiles.m:
      of(tiles.m)
    else:
      pl.when(step < steps - 1)(lambda: of(tiles.m))
      pl.when(step == steps - 1)(lambda: of(short))

  def start_x(step):
    for side, (*_, start, end, _) in enumerate(sides):
      jax.lax.fori_loop(
        start, end, lambda b, _, side=side: copy_x(side, step, b, lambda c: c.start()), None
      )

  @pl.when((i == 0) & (j == 0))
  def _():
    start_x(0)
    for side, (*_, start, end, _) in enumerate(sides):
      jax.lax.fori_loop(start, end, lambda b, _, side=side: copy_w(side, b).start(), None)

  @pl.when((i + 1 < steps) & (j == 0))
  def _():
    start_x(i + 1)

  def block(side, b, multiply, write):
    """Adds a block's product to the sums; the first one met starts from the correction."""
    pl.when(j == 0)(lambda: copy_x(side, i, b, lambda c: c.wait()))
    pl.when((i == 0) & (j == 0))(lambda: copy_w(side, b).wait())
    for rows in _row_tiles(tiles.m):
      before = acc[rows]
      if isinstance(b, jax.Array) or b == 0:
        first = jnp.asarray(b == 0) & ((side == 0) | (low_end == 0))
        before = jnp.where(first, vectors["correction"][...], before)
      write(rows, before + multiply(b, rows))

  def keep(rows, sums):
    acc[rows] = sums

  columns = pl.ds(pl.multiple_of(j * tiles.n, LANES), tiles.n)
  depth = min(plan.block, tiles.k)

  def multiply_low(b, rows):
    total = None
    for at in range(0, tiles.k, depth):
      place = _div(b * tiles.k + at, plan.block)
      packed = w4[b, pl.ds(at // 2, depth // 2), columns]
      product = _dot(
        x4[jax.lax.rem(i, 2), b, rows, pl.ds(at, depth)],
        pltpu.bitcast(packed, jnp.int4),
        plan.interpret,
      )
      if "offsets" in vectors:
        product += vectors["offsets"][pl.ds(place, 1)]
      product <<= jnp.broadcast_to(vectors["shift"][pl.ds(place, 1)], product.shape)
      if row_shift is not None:
        product <<= jnp.broadcast_to(_column(row_shift[rows], place), product.shape)
      total = product if total is None else total + product
    return total

  def multiply_high(b, rows):
    return _dot(x8[jax.lax.rem(i, 2), b, rows], w8[b, :, columns], plan.interpret)

  # Behind the last block a plain epilogue hides beside the matrix unit; one that requantizes is
  # too long for that, and comes after all of them.
  fused = plan.signed is None
  finish = lambda rows, sums: tpu_epilogue.store(sums, vectors, outs[0], rows, plan.activation)
  all_low = high_start == plan.blocks
  loops = (
    (0, 0, low_end, multiply_low, all_low),
    (1, high_start, plan.blocks, multiply_high, ~all_low),
  )
  for side, start, end, multiply, last in loops:
    stop = end - last.astype(jnp.int32) if fused else end
    body = lambda b, _, side=side, multiply=multiply: block(side, b, multiply, keep)
    jax.lax.fori_loop(start, stop, body, None)
    if fused:
      pl.when(last)(functools.partial(block, side, plan.blocks - 1, multiply, finish))
  if not fused:
    tile = tpu_epilogue.Tile(
      sums=acc,
      vectors=vectors,
      start=j * tiles.n,
      boundary=scalars[1],
      written=plan.written(scalars[1]),
    )
    tpu_epilogue.requantize(tile, outs[0], outs[1], plan.activation, plan.signed)


def _device_kind() -> str:
  device = jax.devices()[0]
  return device.device_kind if device.platform == "tpu" else "TPU v5 lite"


def _dot(a, b, interpret: bool):
  if interpret:  # XLA on CPU has no int4 product
    a, b = a.astype(jnp.int8), b.astype(jnp.int8)
  return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _column(table, place):
  """Column `place` (known at run time) of `[rows, J]`, as `[rows, 1]`."""
  here = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) == place
  return jnp.where(here, table, 0).sum(axis=1, keepdims=True)


def _row_tiles(m: int):
  """Slices of at most 256 rows: what the accumulator's registers can turn over."""
  return [pl.ds(at, min(256, m - at)) for at in range(0, m, 256)]


def _check_tiles(tiles: Tiles, k: int, block: int) -> None:
  if k % tiles.k or (block % tiles.k and tiles.k % block) or block % LANES:
    raise NotImplementedError(
      f"tiles.k: {tiles.k} with K = {k} and shift blocks of {block}; a divisor of K is accepted "
      f"that is a multiple or a divisor of the shift block, all multiples of {LANES}"
    )


def _div(a, b: int):
  """Quotient of numbers that are not negative; `//` would ask for the sign, at a cost."""
  return jax.lax.div(jnp.asarray(a, jnp.int32), jnp.int32(b))


def _up(value: int, granule: int) -> int:
  return -(-value // granule) * granule


def _pad(a: Array, axis: int, size: int) -> Array:
  if a.shape[axis] == size:
    return a
  widths = [(0, 0)] * a.ndim
  widths[axis] = (0, size - a.shape[axis])
  return jnp.pad(a, widths)
