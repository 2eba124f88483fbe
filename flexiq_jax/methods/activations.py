"""Quantized activations while a method trains: exact values, straight-through gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax.quant import quantizer

Array = Any


def rounded(x: Array, scale: Array | float, bits: int, signed: bool) -> Array:
  """Activations as codes times their scale, float32.

  Gradients go by x where it does not saturate, and by the scale as in Esser et al., "Learned step
  size quantization" (2020).

  Args:
    x: activations.
    scale: of the tensor.
    bits: width, 2..8.
    signed: whether codes are signed.
  """
  lo, hi = quantizer.code_range(bits, signed)
  steps = jnp.clip(x.astype(jnp.float32) / scale, lo, hi)
  return scale * (steps + jax.lax.stop_gradient(jnp.round(steps) - steps))
