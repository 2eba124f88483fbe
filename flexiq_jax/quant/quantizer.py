"""Uniform quantizers: code ranges, scales, and the search for a clipping range.

| symbol | shape | meaning |
|---|---|---|
| x | any | real values |
| scale | broadcasts against x | real value of one code step; zero point is always 0 |
| q | as x | integer codes, `q = clip(round(x / scale), lo, hi)` with ties to even |

Signed 8-bit codes are -127..127, so that every magnitude fits 7 bits and an extraction shift is
never above 4 (docs/flexiq.md, step A). Narrower signed codes use the whole two's complement
range.
Unsigned codes are 0..2^bits - 1 and are for tensors that calibration never saw negative.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.quant.lowering import lowered_values

Array = Any
RangeMethod = Literal["max", "percentile", "mse", "joint"]
WEIGHT_RANGES: tuple[RangeMethod, ...] = ("max", "percentile", "mse")
ACTIVATION_RANGES: tuple[RangeMethod, ...] = (*WEIGHT_RANGES, "joint")

# What one squared error of 8-bit codes counts beside one of 4-bit codes, whose steps are 16 times
# as wide: enough that the 8-bit model does not suffer (measured on training images of CIFAR-10).
JOINT_WEIGHT = 16.0
# Candidate clipping ranges, as fractions of the largest magnitude.
_FRACTIONS = {8: np.linspace(0.3, 1.0, 71), 4: np.linspace(0.1, 1.0, 91)}


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
  """Smallest and largest code.

  Args:
    bits: width, 2..8.
    signed: two's complement or unsigned.

  Raises:
    ValueError: bits outside 2..8.
  """
  if not 2 <= bits <= 8:
    raise ValueError(f"bits: {bits} is not in 2..8")
  if not signed:
    return 0, 2**bits - 1
  top = 2 ** (bits - 1) - 1
  return (-top if bits == 8 else -top - 1), top


def quantize(x: Array, scale: Array, bits: int, signed: bool = True) -> Array:
  """Real values -> int32 codes, rounded half to even and saturated."""
  lo, hi = code_range(bits, signed)
  q = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), lo, hi)
  return q.astype(jnp.int32)


def divisor(x: Array, scale: Array) -> Array:
  """The scale spread to x's shape, so that x is really divided by it.

  XLA turns a division by a scalar or a row that nothing else reads into a product with its inverse.
  Two programs could then round the same value to different codes. XLA does not do so with a divisor
  that might depend on x.
  """
  return jnp.where(jnp.isnan(x), jnp.float32(1), scale)


def scale_for(clip: Array, bits: int, signed: bool = True) -> Array:
  """Scale that maps the magnitude `clip` to the largest code; 1 where clip is 0."""
  hi = code_range(bits, signed)[1]
  return jnp.where(clip > 0, clip, hi).astype(jnp.float32) / np.float32(hi)


def weight_scale(w: Array, bits: int, method: RangeMethod, percentile: float = 99.99) -> Array:
  """Scale per output channel.

  Args:
    w: `[g, C/g, K, N/g]` canonical weights.
    bits: width, 2..8.
    method: `max`; `percentile` of the magnitudes; `mse`, the clipping range of least squared error.
    percentile: used by `percentile`, 0 < p <= 100.

  Returns:
    float32 `[g, N/g]`.
  """
  w = jnp.asarray(w, jnp.float32)
  top = jnp.abs(w).max(axis=(1, 2))
  if method == "max":
    return scale_for(top, bits)
  if method == "percentile":
    return scale_for(jnp.percentile(jnp.abs(w), percentile, axis=(1, 2)), bits)

  def error(scale):
    s = scale[:, None, None, :]
    return jnp.square(w - quantize(w, s, bits) * s).sum(axis=(1, 2))

  return _least_squares(error, top, bits)


def activation_scale(
  counts: np.ndarray,
  edges: np.ndarray,
  bits: int,
  signed: bool,
  method: RangeMethod,
  percentile: float = 99.99,
) -> float:
  """Per-tensor scale from a histogram of values.

  Args:
    counts: `[B]` how many values fell into each bin.
    edges: `[B + 1]` bin edges, ascending.
    bits: width, 2..8.
    signed: whether codes are signed.
    method: `max`; `percentile` of the magnitudes; `mse`, least squared error with every bin's
      values at its centre; `joint`, least squared error of the 4-bit codes inside the 8-bit ones
      plus `JOINT_WEIGHT` times that of the 8-bit ones. A 4-bit step is a power of two times the
      8-bit step, so changing the 8-bit scale by a few per cent, which hardly matters in 8 bits,
      decides how well 4 bits fit. At other widths `joint` is `mse`.
    percentile: used by `percentile`.
  """
  centers = (edges[1:] + edges[:-1]) / 2
  seen = counts > 0
  if not seen.any():
    return 1.0
  top = float(np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))[seen].max())
  if method == "max":
    return float(scale_for(np.float32(top), bits, signed))
  if method == "percentile":
    order = np.argsort(np.abs(centers))
    share = np.cumsum(counts[order]) / counts.sum()
    clip = np.abs(centers)[order][np.searchsorted(share, min(percentile / 100, share[-1]))]
    return float(scale_for(np.float32(clip), bits, signed))
  joint = method == "joint" and bits == 8
  fractions = np.linspace(0.3, 2.0, 171, dtype=np.float32) if joint else _fractions(bits)
  scales = np.asarray(scale_for(np.float32(top) * fractions, bits, signed), np.float64)[:, None]
  values, weight = centers[seen], counts[seen].astype(np.float64)
  lo, hi = code_range(bits, signed)
  codes = np.clip(np.rint(values / scales), lo, hi)
  errors = np.square(values - codes * scales) @ weight
  if joint:
    index = codes.astype(np.int64) + (128 if signed else 0)
    low = [
      np.square(values - row[index] * scales) @ weight for row in lowered_values(signed, False)
    ]
    errors = JOINT_WEIGHT * errors + np.min(low, axis=0)
  return float(scales[np.argmin(errors), 0])


def _fractions(bits: int) -> np.ndarray:
  return _FRACTIONS[8 if bits >= 6 else 4].astype(np.float32)


def _least_squares(error: Callable[[Array], Array], top: Array, bits: int) -> Array:
  """The scale, among fractions of the largest magnitude, with the least error, elementwise."""

  def step(best, fraction):
    scale = scale_for(top * fraction, bits)
    err = error(scale)
    better = err < best[0]
    return (jnp.where(better, err, best[0]), jnp.where(better, scale, best[1])), None

  start = (jnp.full(top.shape, jnp.inf, jnp.float32), jnp.ones(top.shape, jnp.float32))
  (_, scale), _ = jax.lax.scan(step, start, jnp.asarray(_fractions(bits)[::-1]))
  return scale


def check_one_of(field: str, value: Any, accepted: Sequence[str]) -> None:
  """Raises a ValueError that names the field and what it accepts."""
  if value not in accepted:
    raise ValueError(f"{field}: {value!r} is not one of {', '.join(accepted)}")
