"""Two 4-bit codes per byte, paired along the rows: how packed weights are stored.

Packed row r holds row 2r in its low nibble and row 2r + 1 in its high nibble. This is the order in
which a TPU's registers hold int4 (`pltpu.bitcast`), so unpacking costs nothing there.
"""

from typing import Any

import jax.numpy as jnp

Array = Any


def pack(codes: Array) -> Array:
  """4-bit codes -8..7 `[K, ...]`, of any integer type -> int8 `[K/2, ...]` (NumPy in, NumPy out).

  Raises:
    ValueError: an odd number of rows.
  """
  if codes.shape[0] % 2:
    raise ValueError(f"codes: {codes.shape[0]} rows; an even number can be packed")
  pairs = codes.reshape(codes.shape[0] // 2, 2, *codes.shape[1:]).astype(jnp.int32)
  byte = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
  # The low eight bits as a signed number.
  return (((byte & 255) ^ 128) - 128).astype(jnp.int8)


def unpack(packed: Array) -> Array:
  """int8 `[K/2, ...]` -> 4-bit codes -8..7 as int8 `[K, ...]`."""
  byte = packed.astype(jnp.int32)
  low = ((byte & 15) ^ 8) - 8
  both = jnp.stack([low, byte >> 4], axis=1)
  return both.reshape(2 * packed.shape[0], *packed.shape[1:]).astype(jnp.int8)
