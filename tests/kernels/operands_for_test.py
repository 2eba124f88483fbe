"""Random operands of the mixed matmul and its oracle in NumPy int64."""

import jax.numpy as jnp
import numpy as np

from flexiq_jax.kernels import Activations, Epilogue, Weights, packing


def operands(
  seed: int,
  m: int,
  n: int,
  blocks: int,
  block: int,
  boundary: int,
  *,
  signed: bool = True,
  dynamic: bool = False,
  per_output: bool = True,
) -> tuple[Activations, Weights]:
  """Random codes over their whole range; the unused precision is zero."""
  rng = np.random.default_rng(seed)
  k = blocks * block
  low = np.arange(k) < boundary
  x8 = np.where(low, 0, rng.integers(-128, 128, (m, k)))
  x4 = np.where(low, rng.integers(-8, 8, (m, k)), 0)
  w_shift = rng.integers(0, 5, (blocks, n if per_output else 1))
  x = Activations(
    x8=jnp.asarray(x8, jnp.int8),
    x4=jnp.asarray(x4, jnp.int8).astype(jnp.int4),
    boundary=jnp.int32(boundary),
    row_shift=jnp.asarray(rng.integers(0, 5, (m, blocks)), jnp.int32) if dynamic else None,
  )
  w = Weights(
    w8=jnp.asarray(rng.integers(-128, 128, (k, n)), jnp.int8),
    w4=packing.pack(jnp.asarray(rng.integers(-8, 8, (k, n)), jnp.int32)),
    x_shift=jnp.asarray(rng.integers(0, 5, blocks), jnp.int32),
    w_shift=jnp.asarray(np.broadcast_to(w_shift, (blocks, n)), jnp.int32),
    block=block,
    offset=0 if signed else 8,
  )
  return x, w


def raw(n: int, seed: int = 0) -> Epilogue:
  """An epilogue that returns the integer sum with a random correction."""
  rng = np.random.default_rng(seed)
  return Epilogue(
    scale=jnp.ones(n, jnp.float32),
    correction=jnp.asarray(rng.integers(-(2**20), 2**20, n), jnp.int32),
    out="int32",
  )


def oracle(x: Activations, w: Weights) -> np.ndarray:
  """int64 `[M, N]`: the sum block by block, as the formula says."""
  k, n = w.w8.shape
  packed = np.asarray(w.w4).astype(np.int64)
  w4 = np.empty((k, n), np.int64)
  w4[0::2] = ((packed & 15) ^ 8) - 8
  w4[1::2] = packed >> 4
  x4, x8 = (np.asarray(a.astype(jnp.int8)).astype(np.int64) for a in (x.x4, x.x8))
  w8, w_shift = np.asarray(w.w8).astype(np.int64), np.asarray(w.w_shift)
  total = x8 @ w8
  for j in range(k // w.block):
    rows = slice(j * w.block, (j + 1) * w.block)
    product = x4[:, rows] @ w4[rows]
    if x.row_shift is None:
      total += product << (int(w.x_shift[j]) + w_shift[j])
      continue
    below = np.arange(rows.start, rows.stop) < int(x.boundary)
    product = product + w.offset * w4[rows][below].sum(axis=0)
    total += product << (np.asarray(x.row_shift)[:, j, None] + w_shift[j])
  return total
