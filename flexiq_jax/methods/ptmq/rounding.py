r"""Learned rounding (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization",
ICML 2020): each weight goes to the code below or above it.

    code = clip(floor(w / s) + h(v)),   h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

While training h is anything in 0..1; `regularizer` drives it to an end, and then it is rounded. One
v of each weight serves all widths, each with a scale s of its own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.quant import quantizer

Array = Any

_LOW, _HIGH = -0.1, 1.1


def rectified(v: Array) -> Array:
  """h(v), in 0..1."""
  return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def inverse(h: Array) -> Array:
  """The v of some h in 0..1."""
  share = (h - _LOW) / (_HIGH - _LOW)
  return jnp.log(share) - jnp.log1p(-share)


def start(steps: Array) -> Array:
  """The v whose soft codes are the real weights, `steps = w / s`."""
  return inverse(steps - jnp.floor(steps))


def soft_codes(steps: Array, v: Array, low: Array, high: Array) -> Array:
  """Codes with a fraction, float32; the range of codes may be traced."""
  return jnp.clip(jnp.floor(steps) + rectified(v), low, high)


def hard_codes(steps: Array, v: Array, bits: int) -> Array:
  """Codes, int32."""
  up = rectified(v) >= 0.5
  return jnp.clip(jnp.floor(steps) + up, *quantizer.code_range(bits)).astype(jnp.int32)


def regularizer(v: Array, beta: Array) -> Array:
  """Sum of 1 - |2 h - 1|^beta, float32 []: none where every h is 0 or 1."""
  return jnp.sum(1 - jnp.abs(2 * rectified(v) - 1) ** beta)


def decided(v: Mapping[str, Array]) -> float:
  """Share of the roundings of some layers whose h is within 0.01 of an end."""
  h = np.concatenate([np.ravel(rectified(one)) for one in v.values()])
  return float(((h < 0.01) | (h > 0.99)).mean())


def beta_at(step: Array, steps: int, warmup: float, first: float = 20, last: float = 2) -> Array:
  """The exponent of the regularizer: it falls in a line once the warm-up is over."""
  begin = warmup * steps
  share = jnp.clip((step - begin) / max(steps - begin, 1), 0, 1)
  return first + (last - first) * share
