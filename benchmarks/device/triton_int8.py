"""A plain Triton int8 product with our epilogue: what a day's work gives on the same GPU.

    y[m, n] = bfloat16(scale[n] * sum_k x[m, k] w[n, k] + bias[n])

Both operands lie with K along their rows, as Hopper's int8 tensor cores want them. Imported only
where triton is installed; with TRITON_INTERPRET=1 it runs on a CPU.
"""

import dataclasses
from typing import Any

import torch  # pyrefly: ignore[missing-import]
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Sizes of the kernel's blocks, and how it is launched."""

  m: int
  n: int
  k: int
  stages: int
  warps: int


CHOICES = (
  Blocks(m=128, n=256, k=128, stages=3, warps=8),
  Blocks(m=128, n=128, k=128, stages=4, warps=8),
  Blocks(m=64, n=128, k=128, stages=4, warps=4),
  Blocks(m=64, n=64, k=128, stages=5, warps=4),
  Blocks(m=16, n=64, k=256, stages=5, warps=4),
)


@triton.jit(do_not_specialize=["M"])  # one program for all batches
def _kernel(
  x, w, scale, bias, y, M, N, K,
  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
  # Tiles in groups of rows, so that neighbours in time share their operands in the cache.
  pid = tl.program_id(0)
  rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
  first = pid // (GROUP * columns) * GROUP
  size = tl.minimum(rows - first, GROUP)
  pm = first + (pid % (GROUP * columns)) % size
  pn = (pid % (GROUP * columns)) // size
  m, n, k = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, BK)
  xs = x + m[:, None].to(tl.int64) * K + k[None, :]
  ws = w + n[None, :].to(tl.int64) * K + k[:, None]
  total = tl.zeros((BM, BN), dtype=tl.int32)
  for step in range(0, tl.cdiv(K, BK)):
    inside = k < K - step * BK
    a = tl.load(xs + step * BK, mask=(m[:, None] < M) & inside[None, :], other=0)
    b = tl.load(ws + step * BK, mask=(n[None, :] < N) & inside[:, None], other=0)
    total += tl.dot(a, b, out_dtype=tl.int32)
  real = total.to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
  real += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
  to = y + m[:, None].to(tl.int64) * N + n[None, :]
  tl.store(to, real.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def product(
  x: Array, w: Array, scale: Array, bias: Array, blocks: Blocks, out: Any = torch.bfloat16
) -> Array:
  """`[M, N]` of type `out`, of int8 x `[M, K]` and w `[N, K]`, both contiguous."""
  (m, k), n = x.shape, w.shape[0]
  y = torch.empty((m, n), dtype=out, device=x.device)
  grid = (triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)
  _kernel[grid](
    *(x, w, scale, bias, y, m, n, k),
    BM=blocks.m,
    BN=blocks.n,
    BK=blocks.k,
    GROUP=8,
    num_warps=blocks.warps,
    num_stages=blocks.stages,
  )
  return y


def choices(m: int) -> list[Blocks]:
  """Blocks worth trying for M rows."""
  small = 16 if m <= 64 else 64
  return [b for b in CHOICES if b.m >= small and (b.m <= max(64, m) or b.m == small)]
