"""Effective bit extraction: 4-bit codes taken out of 8-bit codes, below the unused top bits.

    q4 = clip(round(q8 / 2^e), lo, hi)        value q4 * 2^e, in units of the 8-bit step

with 4-bit codes -8..7, or 0..15 for unsigned activations, and an extraction shift e in 0..4 per
channel group (docs/flexiq.md, step C). How e is chosen:

* `range`: the smallest e whose 4-bit codes reach the group's largest magnitude r, that is
  `bitlen(r) + 1 - 4` (unsigned `bitlen(r) - 4`), at least 0. r <= 7 (unsigned 15) is lossless.
* `mse`: the e of least squared error; saturating a rare large value is allowed.
* `naive`: e = 4 everywhere, the top four bits: what extraction is compared with.

Weights are rounded offline, half to even. Activations are rounded at run time, half up, by one add
before the shift. At e = 1 half-up is as biased as truncation is, so the difference is worth points.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Array = Any
ShiftMethod = Literal["range", "mse", "naive"]
SHIFT_METHODS: tuple[ShiftMethod, ...] = ("range", "mse", "naive")
MAX_SHIFT = 4
MEAN_UNITS = 10**4  # mean codes are counted in such fractions of a step


def low_range(signed: bool = True) -> tuple[int, int]:
  """Smallest and largest 4-bit code."""
  return (-8, 7) if signed else (0, 15)


def bitlen(r: Array) -> Array:
  """Bits needed for the magnitude r (0..255): 0 -> 0, 1 -> 1, 255 -> 8."""
  r = jnp.asarray(r, jnp.int32)
  powers = 2 ** jnp.arange(8, dtype=jnp.int32)
  return (r[..., None] >= powers.reshape((1,) * r.ndim + (8,))).sum(axis=-1, dtype=jnp.int32)


def range_shift(r: Array, signed: bool = True) -> Array:
  """Extraction shift from the largest magnitude code of a group (int32, 0..4)."""
  return jnp.clip(bitlen(r) - (3 if signed else 4), 0, MAX_SHIFT)


def unused_bits(r: Array, signed: bool = True) -> Array:
  """Unused magnitude bits of a group, 0..4: the complement of `range_shift`."""
  return MAX_SHIFT - range_shift(r, signed)


def lower_weights(q: Array, e: Array) -> Array:
  """8-bit weight codes -> 4-bit codes, rounded half to even, int32 (NumPy in, NumPy out)."""
  # NumPy compiles nothing, which takes longer than the arithmetic of a layer.
  xp = np if isinstance(q, np.ndarray) and isinstance(e, np.ndarray) else jnp
  # Not exp2, which some backends only approximate.
  step = xp.left_shift(xp.int32(1), xp.asarray(e, xp.int32)).astype(xp.float32)
  lo, hi = low_range()
  return xp.clip(xp.round(xp.asarray(q, xp.float32) / step), lo, hi).astype(xp.int32)


def lower_activations(q: Array, e: Array, signed: bool = True) -> Array:
  """8-bit activation codes -> 4-bit codes, rounded half up (int32)."""
  q, e = jnp.asarray(q, jnp.int32), jnp.asarray(e, jnp.int32)
  lo, hi = low_range(signed)
  half = jnp.left_shift(jnp.int32(1), e) >> 1
  return jnp.clip(jnp.right_shift(q + half, e), lo, hi)


def mean_units(mean: np.ndarray) -> np.ndarray:
  """Mean codes in units of a ten thousandth step, int64, in which sums are exact."""
  return np.rint(np.asarray(mean, np.float64) * MEAN_UNITS).astype(np.int64)


def divide_half_even(n: Array, d: int) -> Array:
  """Integers n / d, rounded half to even (NumPy in, NumPy out)."""
  q, rest = n // d, n % d
  return q + ((2 * rest > d) | ((2 * rest == d) & (q % 2 == 1)))


def lowered_values(signed: bool, half_even: bool) -> np.ndarray:
  """`[5, 256]` what each 8-bit code becomes at each shift, in 8-bit steps (`q4 << e`).

  Column i belongs to code `i - 128` (signed) or `i` (unsigned).
  """
  codes = _all_codes(signed)
  lo, hi = low_range(signed)
  rows = []
  for e in range(MAX_SHIFT + 1):
    low = np.rint(codes / 2**e).astype(np.int64) if half_even else (codes + ((1 << e) >> 1)) >> e
    rows.append(np.clip(low, lo, hi) << e)
  return np.stack(rows)


def squared_errors(signed: bool, half_even: bool) -> np.ndarray:
  """`[5, 256]` squared error of lowering each 8-bit code at each shift, in squared steps."""
  return np.square(_all_codes(signed) - lowered_values(signed, half_even))


def _all_codes(signed: bool) -> np.ndarray:
  return np.arange(256, dtype=np.int64) - (128 if signed else 0)


def choose_shifts(method: ShiftMethod, r: np.ndarray, errors: np.ndarray, signed: bool):
  """Extraction shifts of channel groups.

  Args:
    method: `range`, `mse` or `naive`.
    r: `[...]` largest magnitude code of each group.
    errors: `[..., 5]` squared error of each group at each shift; ties go to the smaller shift,
      those that only the rounding of sums breaks, too.
    signed: whether the codes are signed.

  Returns:
    int32 `[...]`, 0..4.
  """
  if method == "naive":
    return np.full(r.shape, MAX_SHIFT, np.int32)
  if method == "range":
    return np.asarray(range_shift(r, signed), np.int32)
  least = errors.min(axis=-1, keepdims=True)
  return np.argmax(errors <= least * (1 + 1e-12), axis=-1).astype(np.int32)
