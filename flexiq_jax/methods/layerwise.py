"""Layers at any bit width of a set, chosen at run time: what layer-wise methods measure and run.

    stacks = layerwise.create(layers, weights, values, ranges, bits=(2, 4, 8))
    model = layerwise.Layerwise(apply, params, stacks)
    logits = model.exact({"conv1": 8, "conv2": 2, ...}, x)

Every layer keeps its weight codes at all widths, stacked. A *choice* is one number for each layer,
the position of its width in `bits`, or `len(bits)` for float; it is a traced array, so that no
choice ever compiles anything anew. Two rules compute it:

| rule | contracts | float layers | for |
|---|---|---|---|
| `layerwise_rule` | float32 | traced like widths | sensitivities: one layer or two at a time |
| `plan_rule` | int8 x int8 -> int32, exact | static | the accuracy of a plan |

The second is `rules.uniform_rule` bit for bit wherever all layers have one width. The first differs
from it by the rounding of float32 sums only.

| symbol | meaning |
|---|---|
| I | layers |
| B | bit widths |
"""

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.graph import Apply, Layer, closest, with_rule
from flexiq_jax.quant import RangeSettings, Values, quantizer, rules
from flexiq_jax.quant.calibration import quantize_layer

Array = Any

FLOAT = 32  # the width that stands for a layer in floating point


@struct.dataclass
class Stack:
  """One layer at every width of a set.

  Attributes:
    w: int8 `[B, *w_shape]`, weight codes.
    w_scale: float32 `[B, N]`.
    x_scale: float32 `[B]`.
    x_range: float32 `[B, 2]`, least and largest activation code.
    signed: whether activation codes are signed.
  """

  w: Array
  w_scale: Array
  x_scale: Array
  x_range: Array
  signed: bool = struct.field(pytree_node=False)

  def dequantized(self, layer: Layer, k: Array) -> Array:
    """The layer's weights at width number `k`, float32 `w_shape`."""
    codes = layer.canonical(self.w[k].astype(jnp.float32))
    return layer.native(codes * self.w_scale[k].reshape(layer.groups, 1, 1, -1))


@struct.dataclass
class Stacks:
  """All layers of a model at every width of a set.

  Attributes:
    layers: a stack for each name.
    names: layer names in execution order; static.
    bits: widths of the weights, ascending or not; static. They also name the choice.
    activation_bits: the width of the layer's input that goes with each; static.
  """

  layers: tuple[Stack, ...]
  names: tuple[str, ...] = struct.field(pytree_node=False)
  bits: tuple[int, ...] = struct.field(pytree_node=False)
  activation_bits: tuple[int, ...] = struct.field(pytree_node=False)

  def choice(self, bits: Mapping[str, int]) -> np.ndarray:
    """Bits of every layer -> the choice, int32 `[I]`.

    Args:
      bits: layer name -> a width of `self.bits`, or `FLOAT`.

    Raises:
      ValueError: other layers than the model's, or a width that is not in the set.
    """
    if unknown := [name for name in bits if name not in self.names]:
      near = closest(unknown[0], self.names)
      raise ValueError(f"bits: no layer {unknown[0]!r}; closest names: {near}")
    if missing := [name for name in self.names if name not in bits]:
      raise ValueError(f"bits: none for layer {missing[0]!r} and {len(missing) - 1} more layers")
    widths = (*self.bits, FLOAT)
    for name, width in bits.items():
      if width not in widths:
        raise ValueError(f"bits: {width} for layer {name}; expected one of {widths} (32: float)")
    return np.array([widths.index(bits[name]) for name in self.names], np.int32)

  def stack(self, name: str) -> Stack:
    """The stack of a layer."""
    return self.layers[self._number(name)]

  def chosen(self, choice: Array, name: str) -> Array:
    """The layer's entry of a choice `[I]`."""
    return choice[self._number(name)]

  def _number(self, name: str) -> int:
    if name not in self.names:
      near = closest(name, self.names)
      raise ValueError(f"stacks: layer {name} was not quantized; closest names: {near}")
    return self.names.index(name)


def create(
  layers: Sequence[Layer],
  weights: Mapping[str, Array],
  values: Mapping[str, Values],
  settings: RangeSettings,
  *,
  bits: Sequence[int],
  activation_bits: int | Sequence[int] | None = None,
  per_channel: bool = True,
) -> Stacks:
  """Quantizes every layer at every width, as `calibration.quantize` does at one.

  Args:
    layers: from `graph.layers`.
    weights: from `graph.weights`, after folded batch norm.
    values: from `calibration.observe_values`.
    settings: how clipping ranges are found.
    bits: widths of the weights, 2..8, all different.
    activation_bits: width of the inputs, one for all or one for each of `bits`; None: as `bits`.
    per_channel: weight scales per output channel; otherwise one for a whole layer, as in CLADO's
      experiments.

  Raises:
    ValueError: widths outside 2..8 or given twice, or a layer that was not calibrated.
  """
  bits = tuple(bits)
  if activation_bits is None or isinstance(activation_bits, int):
    activation_bits = bits if activation_bits is None else [activation_bits] * len(bits)
  wide = tuple(activation_bits)
  if not bits or len(set(bits)) < len(bits):
    raise ValueError(f"bits: {bits}; expected at least one width, all different")
  if len(wide) != len(bits):
    raise ValueError(
      f"activation_bits: {wide} for {len(bits)} widths of weights; expected one each"
    )
  for field, given in (("bits", bits), ("activation_bits", wide)):
    if wrong := [b for b in given if b not in range(2, 9)]:
      raise ValueError(f"{field}: {wrong[0]}; widths of 2..8 are accepted")
  if missing := [layer.name for layer in layers if layer.name not in values]:
    raise ValueError(f"values: layer {missing[0]} was not calibrated")

  def stack(layer: Layer) -> Stack:
    seen, w = values[layer.name], weights[layer.name]
    signed = not (settings.unsigned and seen.nonnegative)
    method = (settings.activation, settings.percentile)
    scale = {
      a: quantizer.activation_scale(seen.counts, seen.edges, a, signed, *method) for a in set(wide)
    }
    quantized = [_weights(layer, w, settings, b, per_channel) for b in bits]
    return Stack(
      w=jnp.stack([codes for codes, _ in quantized]),
      w_scale=jnp.stack([s for _, s in quantized]),
      x_scale=jnp.array([scale[a] for a in wide], jnp.float32),
      x_range=jnp.array([quantizer.code_range(a, signed) for a in wide], jnp.float32),
      signed=signed,
    )

  names = tuple(layer.name for layer in layers)
  stacks = tuple(stack(layer) for layer in layers)
  return Stacks(layers=stacks, names=names, bits=bits, activation_bits=wide)


def fake_quantized(layer: Layer, x: Array, w: Array, contract, stack: Stack, k: Array) -> Array:
  """One layer at the width of number `k`, a traced int32 scalar; B is float.

  The scales multiply the result of the contraction, so that float32 adds up whole numbers.
  """
  widths = len(stack.x_scale)
  is_float, k = k == widths, jnp.minimum(k, widths - 1)
  x = jnp.where(is_float, x.astype(jnp.float32), _codes(x, stack, k))
  w = jnp.where(is_float, w.astype(jnp.float32), stack.w[k].astype(jnp.float32))
  scale = jnp.where(is_float, 1.0, stack.w_scale[k] * stack.x_scale[k])
  y = contract(x, w, jnp.float32)
  return y * layer.y_vector(scale, y.shape)


def layerwise_rule(stacks: Stacks, choice: Array) -> rules.Rule:
  """Layers fake-quantized at the chosen widths: float32, every choice traced, float included.

  Args:
    stacks: all layers of the model.
    choice: int `[I]` (see `Stacks.choice`).
  """

  def rule(layer, x, w, contract):
    k = stacks.chosen(choice, layer.name)
    return fake_quantized(layer, x, w, contract, stacks.stack(layer.name), k)

  return rule


def plan_rule(
  stacks: Stacks, choice: Array, floats: Collection[str] = (), platform: str | None = None
) -> rules.Rule:
  """Layers at the chosen widths, exactly: int8 codes, int32 sums, then the scales.

  Args:
    stacks: all layers of the model.
    choice: int `[I]`, of widths (see `Stacks.choice`).
    floats: names of layers in floating point, static; their choice is not read.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.
  """

  def rule(layer, x, w, contract):
    if layer.name in floats:
      return contract(x, w)
    stack, k = stacks.stack(layer.name), stacks.chosen(choice, layer.name)
    # Codes of every width are 8-bit codes, of which `product` knows to add exactly.
    q = rules.QLayer(stack.w[k], stack.w_scale[k], stack.x_scale[k], signed=stack.signed)
    codes = _codes(x, stack, k).astype(jnp.int32)
    acc = rules.product(layer, q, codes, q.w, contract, platform)
    return acc.astype(jnp.float32) * layer.y_vector(q.w_scale * q.x_scale, acc.shape)

  return rule


class Layerwise:
  """A model that runs at any bits per layer; compiled once for all choices.

  Attributes:
    stacks: its layers.
    traces: `exact` and `simulated` -> how often they were traced: once for each batch shape, the
      first also once for each set of float layers.
  """

  def __init__(self, apply: Apply, params: Any, stacks: Stacks, platform: str | None = None):
    """Wraps a float model, batch norm folded, and its layers; for `platform` see `plan_rule`."""
    self.params, self.stacks = params, stacks
    self.traces: collections.Counter[str] = collections.Counter()

    def run_exact(stacks, params, choice, floats, x):
      self.traces["exact"] += 1
      return with_rule(apply, plan_rule(stacks, choice, floats, platform))(params, x)

    def run_simulated(stacks, params, choice, x):
      self.traces["simulated"] += 1
      return with_rule(apply, layerwise_rule(stacks, choice))(params, x)

    self._exact = jax.jit(run_exact, static_argnums=3)
    self._simulated = jax.jit(run_simulated)

  def exact(self, bits: Mapping[str, int], x: Array) -> Array:
    """Logits by `plan_rule`; `bits` as for `Stacks.choice`."""
    choice = np.minimum(self.stacks.choice(bits), len(self.stacks.bits) - 1)
    floats = frozenset(name for name, width in bits.items() if width == FLOAT)
    return self._exact(self.stacks, self.params, choice, floats, x)

  def simulated(self, bits: Mapping[str, int], x: Array) -> Array:
    """Logits by `layerwise_rule`; `bits` as for `Stacks.choice`."""
    return self._simulated(self.stacks, self.params, self.stacks.choice(bits), x)


def _codes(x: Array, stack: Stack, k: Array) -> Array:
  """Activation codes as float32; `quantizer.quantize` with a traced width."""
  codes = jnp.round(x.astype(jnp.float32) / stack.x_scale[k])
  return jnp.clip(codes, stack.x_range[k, 0], stack.x_range[k, 1])


def _weights(
  layer: Layer, w: Array, settings: RangeSettings, bits: int, per_channel: bool
) -> tuple[Array, Array]:
  """Codes int8 `w_shape` and scales float32 `[N]`."""
  if per_channel:
    q = quantize_layer(layer, w, 1.0, True, settings, bits)
    return q.w, q.w_scale
  w = jnp.asarray(w, jnp.float32)
  whole = w.reshape(1, -1, 1, 1)
  scale = quantizer.weight_scale(whole, bits, settings.weight, settings.percentile)[0, 0]
  codes = quantizer.quantize(w, scale, bits).astype(jnp.int8)
  return codes, jnp.full(layer.out_channels, scale)
