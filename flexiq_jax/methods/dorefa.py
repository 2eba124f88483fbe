r"""DoReFa's quantizer of weights (arXiv 1606.06160), with bits that are dropped.

    u = tanh(w) / (2 max |tanh(w)|) + 1/2,   c = a code of u,   w_k = (2 c / (2^k - 1) - 1) E,

with E = mean |w|, through which no gradient goes; a rounding is the identity for gradients. The
code of k bits has two forms:

| form | c |
|---|---|
| `round` | `round((2^k - 1) u)`: from real weights at every width, as the published code does |
| `truncate` | `round(255 u) >> (8 - k)`: the top k bits of one 8-bit code, as the paper says |

Only truncated codes of all widths are one stored code: its low bits are dropped at run time. Bits
can be dropped in several steps, and the result is the same. Both forms agree at 8 bits, and differ
by one at most elsewhere.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = Any

DROPS = ("round", "truncate")


def unit(w: Array) -> Array:
  """Weights in 0..1; gradients go through all of it, the maximum, too."""
  bent = jnp.tanh(w.astype(jnp.float32))
  return bent / (2 * jnp.abs(bent).max()) + 0.5


def code(u: Array, bits: int) -> Array:
  """Values in 0..1 -> int32 codes 0..2^bits - 1, rounded half to even."""
  return jnp.round(u * (2**bits - 1)).astype(jnp.int32)


def dropped(code8: Array, bits: int) -> Array:
  """8-bit codes -> their top bits."""
  return code8 >> (8 - bits)


def stored(w: Array) -> tuple[Array, Array]:
  """All that is kept of weights whose bits are dropped: uint8 codes, and E, float32 []."""
  return code(unit(w), 8).astype(jnp.uint8), jnp.abs(w).mean()


def value(codes: Array, bits: int, mean: Array) -> Array:
  """Codes of some bits -> weights, float32."""
  return (codes.astype(jnp.float32) * (2 / (2**bits - 1)) - 1) * mean


def weights(w: Array, bits: int, drop: str) -> Array:
  """Quantized weights with straight-through gradients, float32.

  Args:
    w: weights.
    bits: 2..8.
    drop: one of `DROPS`.
  """
  u = unit(w)
  codes = code(u, bits) if drop == "round" else dropped(code(u, 8), bits)
  mean = jax.lax.stop_gradient(jnp.abs(w).mean())
  exact = value(codes, bits, mean)
  smooth = (2 * u - 1) * mean
  return smooth + jax.lax.stop_gradient(exact - smooth)
