r"""Rounds a layer's weights for the outputs that they give in 8 and in 4 bits at once.

The 4-bit code of a weight is a function of its 8-bit code, `low(q) = lower(q) << e`, so one
rounding serves every ratio. Rounding each weight to the nearest code makes each weight's error
small, not the output's. Here the output's error is made small, over some ratios r together:

    sum_r a_r sum_n s_n^2  (d_rn' H_r d_rn + (m' d_0n)^2),       d_r = w_r(q) - v

| symbol | meaning |
|---|---|
| R, N | weights of one output (feature channels times window); outputs |
| v | `[R, N]` real weights, in steps of 8 bits |
| q | `[R, N]` codes |
| w_r(q) | `low(q)` for feature channels in 4 bits at ratio r, else q |
| H_r | `[R, R]` covariance of the input codes that the layer sees at r |
| m, d_0 | `[R]` means of the 8-bit input codes; q - v |
| s_n | step of an output's weights |
| a_r | 1 / the error at r of the codes given, to a power (`balance`) |

The bias correction brings the mean output of every ratio to that of the 8-bit codes, not to that of
the real weights: so means are left out of H_r and have a term of their own. Nagel et al., "Up or
down?" (AdaRound, 2020) state this problem for one width and relax it; here codes change one at a
time, as in Behdin et al., "QuantEase" (2023), for all outputs at once, and no code may get worse.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.quant import lowering, quantizer

Array = Any
# An error of zero would make its ratio count more than everything else.
_LEAST = 1e-6


class Rounded(NamedTuple):
  """Codes, and what they are worth.

  Attributes:
    codes: int32 `[R, N]`.
    before, after: float32 `[V]`, the output's squared error at each ratio, of the codes given and
      of these; in squared steps of activation and weights, mean over rows of the input.
  """

  codes: Array
  before: Array
  after: Array


def round_weights(
  moments: Array,
  mean: Array,
  weights: Array,
  codes: Array,
  shifts: Array,
  low: Array,
  steps: Array,
  *,
  sweeps: int,
  balance: Array,
) -> Rounded:
  """Finds codes from which no change of one code to a neighbouring 4-bit code is better.

  Args:
    moments: float32 `[V, R, R]`, H_r.
    mean: float32 `[R]`, m; zeros where the means are in H_r.
    weights: float32 `[R, N]`, v.
    codes: int32 `[R, N]`, where to start.
    shifts: int32 `[R, 1]` or `[R, N]`, extraction shifts of the weights.
    low: bool `[V, R]`, which rows are in 4 bits at each ratio.
    steps: float32 `[N]`, s_n.
    sweeps: passes over all rows; the last ones change little. Static.
    balance: 1 lets no ratio gain at the cost of another, 0 adds the errors up as they are.
  """
  # The mean's error is one more ratio at which all channels are in 8 bits.
  moments = jnp.concatenate([moments, jnp.outer(mean, mean)[None]])
  low = jnp.concatenate([low, jnp.zeros_like(low[:1])])
  shifts = jnp.broadcast_to(shifts, weights.shape)
  rows = len(weights)
  gradient = functools.partial(_gradient, moments, weights, shifts, low)
  error = functools.partial(_error, moments, weights, shifts, low, steps)
  before = error(codes)
  largest = jnp.maximum(before.max(), jnp.finfo(jnp.float32).tiny)
  share = (largest / jnp.maximum(before, _LEAST * largest)) ** balance
  share = jnp.append(share, share.sum())
  diagonals = jnp.diagonal(moments, axis1=1, axis2=2)  # [V, R]

  def visit(i, state):
    codes, slopes = state
    row = i % rows
    here = codes[row], shifts[row], slopes[:, row], diagonals[:, row], low[:, row]
    chosen = _best(*here, share)
    change = _changes(codes[row], chosen, shifts[row], low[:, row])
    slopes += moments[:, :, row][:, :, None] * change[:, None, :]
    return codes.at[row].set(chosen), slopes

  def sweep(_, codes):
    # Afresh in every sweep, so that the roundings of many small changes do not add up.
    return jax.lax.fori_loop(0, rows, visit, (codes, gradient(codes)))[0]

  found = jax.lax.fori_loop(0, sweeps, sweep, codes)
  return Rounded(found, before, error(found))


def _best(codes, shifts, slopes, curvatures, low, share) -> Array:
  """The best codes of one row, int32 `[N]`: of its 4-bit codes, the ones beside and its own.

  Args:
    codes: int32 `[N]`, the row's.
    shifts: int32 `[N]`.
    slopes: float32 `[V, N]`, half of the derivatives of the errors by the row.
    curvatures: float32 `[V]`, H_r of the row with itself.
    low: bool `[V]`.
    share: float32 `[V]`, a_r.
  """
  lowest, highest = quantizer.code_range(8)
  least, most = lowering.low_range()
  inside = lowering.lower_weights(codes, shifts)
  # Where the row is in 8 bits any code will do: the minimum of a parabola.
  wide = jnp.where(low, 0, share)
  bend = jnp.maximum((wide * curvatures).sum(), jnp.finfo(jnp.float32).tiny)
  wanted = jnp.round(codes - (wide[:, None] * slopes).sum(axis=0) / bend)
  wanted = jnp.clip(wanted, lowest, highest).astype(jnp.int32)
  found, gain = codes, jnp.zeros_like(slopes[0])
  for beside in (-1, 0, 1):
    low_code = jnp.clip(inside + beside, least, most)
    # The 8-bit codes with this 4-bit code: ties go to even ones, and the last ones saturate.
    half = (1 << shifts) >> 1
    odd = jnp.where((low_code & 1 == 1) & (shifts > 0), 1, 0)
    first = jnp.where(low_code == least, lowest, (low_code << shifts) - half + odd)
    last = jnp.where(low_code == most, highest, (low_code << shifts) + half - odd)
    code = jnp.clip(jnp.clip(wanted, first, last), lowest, highest)
    change = _changes(codes, code, shifts, low)
    value = (share[:, None] * change * (change * curvatures[:, None] + 2 * slopes)).sum(axis=0)
    found, gain = jnp.where(value < gain, code, found), jnp.minimum(value, gain)
  return found


def _changes(old, new, shifts, low) -> Array:
  """How far a row's weights move at each ratio, float32 `[V, N]`."""
  narrow = (lowering.lower_weights(new, shifts) - lowering.lower_weights(old, shifts)) << shifts
  return jnp.where(low[:, None], narrow[None], (new - old)[None]).astype(jnp.float32)


def _gradient(moments, weights, shifts, low, codes) -> Array:
  """`H_r d_r`, float32 `[V, R, N]`."""
  return jnp.einsum("vij,vjn->vin", moments, _differences(weights, shifts, low, codes))


def _error(moments, weights, shifts, low, steps, codes) -> Array:
  """The errors of the ratios, float32 `[V]`, each with that of the mean, which is the last row."""
  found = _differences(weights, shifts, low, codes)
  squares = (found * jnp.einsum("vij,vjn->vin", moments, found)).sum(axis=1)
  found = (squares * jnp.square(steps)[None]).sum(axis=1)
  return found[:-1] + found[-1]


def _differences(weights, shifts, low, codes) -> Array:
  narrow = lowering.lower_weights(codes, shifts) << shifts
  used = jnp.where(low[:, :, None], narrow[None], codes[None])
  return used.astype(jnp.float32) - weights[None]


def covariance(
  count: float, total: np.ndarray, second: np.ndarray, central: bool = True
) -> np.ndarray:
  """Sums over rows -> covariance, float32 `[R, R]`.

  Args:
    count: rows.
    total: `[R]`, their sum.
    second: `[R, R]`, the sum of their outer products.
    central: whether the means are taken off.
  """
  count = max(count, 1.0)
  mean = np.asarray(total, np.float64) / count * central
  return (np.asarray(second, np.float64) / count - np.outer(mean, mean)).astype(np.float32)
