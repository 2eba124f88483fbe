r"""Reconstruction of one block of a model at three widths of its activations.

| symbol | meaning |
|---|---|
| f_l, f_m, f_h | the block's output with activations at the low, middle and high width |
| f | that of the float model |
| f_lmh | lambda_1 f_l + lambda_2 f_m + lambda_3 f_h (`blend`) |

The loss is the group-wise distillation of PTMQ,

    gamma_1 |f - f_lmh|^2 + gamma_2 |f_h - f_m|^2 + gamma_3 |f_h - f_l|^2,

means of squares, with the regularizer of rounding. The block's input is, entry by entry, the float
model's or the mixed output of the block before (`mix`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.graph import Contract, Layer, Rule
from flexiq_jax.methods import activations
from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.quant import quantizer, rules

Array = Any


@struct.dataclass
class Grid:
  """One layer at each width.

  Attributes:
    w: float32 `w_shape`, real weights.
    w_scale: float32 `[B, N]`.
    w_range: float32 `[B, 2]`, least and largest code.
    x_scale: float32 `[B]`.
    bits: the B widths; static.
    signed: whether codes of the input are signed; static.
  """

  w: Array
  w_scale: Array
  w_range: Array
  x_scale: Array
  bits: tuple[int, ...] = struct.field(pytree_node=False)
  signed: bool = struct.field(pytree_node=False)

  def spread(self, layer: Layer, k: Array) -> Array:
    """The weight scale of width number k, an array that broadcasts against w."""
    shape = (layer.groups, layer.in_channels // layer.groups, int(np.prod(layer.window)), -1)
    scale = self.w_scale[k].reshape(layer.groups, 1, 1, -1)
    return layer.native(jnp.broadcast_to(scale, (*shape[:3], scale.shape[-1])))

  def steps(self, layer: Layer, k: Array) -> Array:
    """Weights in steps of width number k."""
    return self.w / self.spread(layer, k)


def grid(layer: Layer, w: Array, models: Mapping[int, rules.QModel]) -> Grid:
  """The scales of a layer at each width, from models that are quantized uniformly."""
  found = [models[bits][layer.name] for bits in models]
  return Grid(
    w=jnp.asarray(w, jnp.float32),
    w_scale=jnp.stack([q.w_scale for q in found]),
    w_range=jnp.array([quantizer.code_range(bits) for bits in models], jnp.float32),
    x_scale=jnp.stack([q.x_scale for q in found]),
    bits=tuple(models),
    signed=found[0].signed,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Widths:
  """A block's layers at widths of weights and activations.

  Attributes:
    grids: layer name -> its grid, of layers that are lowered.
    base: all other layers, in 8 bits.
  """

  grids: Mapping[str, Grid]
  base: rules.QModel

  def rule(self, trained: Mapping[str, Any], weight: Array, activation: int) -> Rule:
    """Layers with soft codes of weights.

    Args:
      trained: `v` and `log_x` (logarithms of what input scales are multiplied by, `[B]`) by layer.
      weight: number of the width of weights; may be traced.
      activation: number of that of inputs.
    """

    def run(layer: Layer, x: Array, w: Array, contract: Contract) -> Array:
      name = layer.name
      if name not in self.grids:
        q = self.base[name]
        x = activations.rounded(x, q.x_scale, q.bits, q.signed)
        y = contract(x, q.w.astype(jnp.float32), jnp.float32)
        return y * layer.y_vector(q.w_scale, y.shape)
      own, k = self.grids[name], activation
      scale = own.x_scale[k] * jnp.exp(trained["log_x"][name][k])
      low, high = own.w_range[weight, 0], own.w_range[weight, 1]
      codes = rounding.soft_codes(own.steps(layer, weight), trained["v"][name], low, high)
      x = activations.rounded(x, scale, own.bits[k], own.signed)
      return contract(x, codes * own.spread(layer, weight), jnp.float32)

    return run


def blend(outputs: Sequence[Any], shares: Sequence[float]) -> Any:
  """f_lmh of outputs, trees of arrays."""
  return jax.tree.map(lambda *f: sum(s * a for s, a in zip(shares, f, strict=True)), *outputs)


def mix(key: Array, real: Any, blended: Any, share: float) -> Any:
  """Each entry is the float model's with probability `share`; trees of arrays."""
  leaves, structure = jax.tree.flatten(real)
  others = jax.tree.leaves(blended)
  keys = jax.random.split(key, len(leaves))
  pick = lambda key, a, b: jnp.where(jax.random.uniform(key, a.shape) < share, a, b)
  return structure.unflatten([*map(pick, keys, leaves, others)])


def distillation(real: Any, outputs: Sequence[Any], blended: Any, gammas: Sequence[float]) -> Array:
  """The group-wise distillation loss, float32 []."""

  def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(jnp.mean(jnp.square(p.astype(jnp.float32) - q)) for p, q in pairs)

  low, middle, high = outputs
  parts = apart(real, blended), apart(high, middle), apart(high, low)
  return sum(gamma * part for gamma, part in zip(gammas, parts, strict=True))
