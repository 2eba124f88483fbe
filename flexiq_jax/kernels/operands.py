"""What the mixed matmul works on.

    y[m, n] = act(scale[n] * (sum + correction[n]) + bias[n])
    sum     = sum_j (x4_j @ w4_j) << (x_shift[j] + w_shift[j, n])  +  x8 @ w8

| symbol | meaning |
|---|---|
| M, N | rows of x (pixels or tokens of the batch), output channels |
| K | rows of w in *layout order*: first to go to 4 bits first |
| S | `block`: rows of K in a shift block, which share one activation shift |
| J | shift blocks, K / S; j is the block of a row of K |

The first `boundary` rows of K are in 4 bits and the rest in 8. Entries of the precision that is not
in use are zero, so the sum is right whatever a kernel skips: blocks wholly on one side of the
boundary need one product, the block that holds it needs both. With a window (`windows`) x has a
column for each channel only, rows of w are (block, window position, channel), and the boundary
counts columns of x.

Unsigned activations enter as `q - 128` and `code - 8`. For each boundary and output this changes
the sum by a constant, which `Epilogue.correction` adds back. Only where the shift of 4-bit codes is
chosen at run time does the kernel add it, before the shift (`low_offsets`).
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import struct

from flexiq_jax.kernels import packing

Array = Any
Activation = Literal["none", "relu", "relu6", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "relu6", "gelu", "gelu_tanh")
OUTPUTS = ("float32", "bfloat16", "int32")


@struct.dataclass
class Activations:
  """Lowered and permuted activation codes.

  Attributes:
    x8: int8 `[M, K]`, 8-bit codes (unsigned ones less 128); zero in rows of K below the boundary.
    x4: int4 `[M, K]`, 4-bit codes (unsigned ones less 8); zero from the boundary on.
    boundary: int32 `[]`, how many columns are in 4 bits.
    row_shift: int32 `[M, J]`, activation shifts chosen at run time; None for static ones.
  """

  x8: Array
  x4: Array
  boundary: Array
  row_shift: Array | None = None


@struct.dataclass
class Weights:
  """A layer's weights in both precisions.

  Attributes:
    w8: int8 `[K, N]`.
    w4: int8 `[K/2, N]`, packed 4-bit codes (see `packing`).
    x_shift: int32 `[J]`, static extraction shift of the activation.
    w_shift: int32 `[J, N]`, extraction shift of the weights.
    block: S.
    offset: what was taken off the activations' 4-bit codes: 8 for unsigned ones, else 0.
    taps: window positions of a shift block, position by position; 1 where x has all rows of K.
    copies: how often x holds each channel, in neighbouring columns, where a block has fewer
      channels than a register has lanes: so many window positions then lie side by side.
  """

  w8: Array
  w4: Array
  x_shift: Array
  w_shift: Array
  block: int = struct.field(pytree_node=False)
  offset: int = struct.field(pytree_node=False, default=0)
  taps: int = struct.field(pytree_node=False, default=1)
  copies: int = struct.field(pytree_node=False, default=1)

  @property
  def steps(self) -> int:
    """How many rows of w each column of x has."""
    return -(-self.taps // self.copies)


@struct.dataclass
class Requantize:
  """The result as the operand of the next layer, whose channels are this one's outputs.

  Attributes:
    scale: float32 `[]`, activation scale of the next layer.
    boundary: int32 `[]`, how many of the N outputs are in 4 bits there.
    shift: int32 `[N]`, the next layer's activation shift of each output.
    signed: whether the next layer's codes are signed.
    granule: the next layer's kernel reads blocks of so many channels, each in one precision, and
      the block that holds its boundary in both. What it does not read is not written and undefined.
      0 writes both precisions everywhere.
  """

  scale: Array
  boundary: Array
  shift: Array
  signed: bool = struct.field(pytree_node=False, default=True)
  granule: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Epilogue:
  """What follows the integer sum.

  Attributes:
    scale: float32 `[N]`, activation scale times weight scale.
    correction: int32 `[N]`, added to the integer sum: offsets of unsigned codes, bias corrections.
    bias: float32 `[N]` or None.
    requantize: makes the result the next layer's codes instead of `out`.
    activation: none, relu, relu6, gelu (exact) or gelu_tanh.
    out: float32, bfloat16, or int32 (sum and correction alone).
  """

  scale: Array
  correction: Array
  bias: Array | None = None
  requantize: Requantize | None = None
  activation: Activation = struct.field(pytree_node=False, default="none")
  out: str = struct.field(pytree_node=False, default="float32")


def total_shift(w: Weights) -> Array:
  """int32 `[J, N]`, the shift of a block's product with static activation shifts."""
  return w.x_shift[:, None] + w.w_shift


def low_rows(w: Weights, boundary: Array) -> Array:
  """Which rows of w are in 4 bits, bool `[K]`."""
  row = jnp.arange(w.w8.shape[0], dtype=jnp.int32)
  columns = w.block // w.steps
  column = row if w.steps == 1 else row // w.block * columns + row % w.block % columns
  return column < boundary


def low_offsets(w: Weights, boundary: Array) -> Array:
  """int32 `[J, N]`: `offset` times the sums of each block's 4-bit weights below the boundary."""
  k, n = w.w8.shape
  codes = jnp.where(low_rows(w, boundary)[:, None], packing.unpack(w.w4), 0).astype(jnp.int32)
  return w.offset * codes.reshape(k // w.block, w.block, n).sum(axis=1)


def check(x: Activations, w: Weights, epilogue: Epilogue) -> None:
  """Checks that operands fit each other.

  Raises:
    ValueError: naming the field, what it is and what was expected.
  """
  if x.x8.ndim != 2 or w.w8.ndim != 2:
    raise ValueError(
      f"x8, w8: of {x.x8.ndim} and {w.w8.ndim} dimensions; [M, K] and [K, N] are accepted"
    )
  m, (k, n) = x.x8.shape[0], w.w8.shape
  if w.taps < 1 or w.copies < 1 or w.block % (w.steps * w.copies):
    raise ValueError(
      f"taps, copies: {w.taps} and {w.copies}; rows of a shift block, {w.block}, are a multiple of "
      "copies in each of taps / copies steps"
    )
  if w.block < 2 or w.block % 2 or k % w.block:
    raise ValueError(
      f"block: {w.block} rows in a shift block, K is {k}; an even divisor of K is accepted (pad K)"
    )
  j = k // w.block
  expected: list[tuple[str, Any, str, tuple[int, ...]]] = [
    ("x8", x.x8, "int8", (m, k // w.steps)),
    ("x4", x.x4, "int4", (m, k // w.steps)),
    ("boundary", x.boundary, "int32", ()),
    ("w8", w.w8, "int8", (k, n)),
    ("w4", w.w4, "int8", (k // 2, n)),
    ("x_shift", w.x_shift, "int32", (j,)),
    ("w_shift", w.w_shift, "int32", (j, n)),
    ("scale", epilogue.scale, "float32", (n,)),
    ("correction", epilogue.correction, "int32", (n,)),
  ]
  if x.row_shift is not None:
    expected.append(("row_shift", x.row_shift, "int32", (m, j)))
  if epilogue.bias is not None:
    expected.append(("bias", epilogue.bias, "float32", (n,)))
  if (r := epilogue.requantize) is not None:
    expected += [
      ("requantize.scale", r.scale, "float32", ()),
      ("requantize.boundary", r.boundary, "int32", ()),
      ("requantize.shift", r.shift, "int32", (n,)),
    ]
  for name, array, dtype, shape in expected:
    if array.shape != shape or array.dtype != jnp.dtype(dtype):
      raise ValueError(
        f"{name}: {array.dtype} {list(array.shape)}; {dtype} {list(shape)} is accepted with x8 "
        f"{list(x.x8.shape)}, w8 {list(w.w8.shape)} and shift blocks of {w.block} rows"
      )
  if w.offset not in (0, 8):
    raise ValueError(f"offset: {w.offset}; 0 (signed activations) or 8 (unsigned) is accepted")
  if epilogue.activation not in ACTIVATIONS:
    raise ValueError(f"activation: {epilogue.activation!r}; one of {', '.join(ACTIVATIONS)}")
  if epilogue.out not in OUTPUTS:
    raise ValueError(f"out: {epilogue.out!r}; one of {', '.join(OUTPUTS)}")
