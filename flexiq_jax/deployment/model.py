"""The deployed model: packed integer weights, and a level that is a number on the device.

    deployed = deployment.deploy(model, x[:1])
    run = jax.jit(deployment.apply)
    logits = run(deployed, x, deployed.level(0.5))

The model's own jaxpr runs, with every layer computed by the mixed matmul (`deployment.layers`).
Where one layer feeds only one other (`deployment.links`), the first emits the codes of the second,
and the activation between them is never a float. One executable serves all levels; a level is an
index into the arrays that depend on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flexiq_jax import graph
from flexiq_jax.deployment import depthwise, layers, links, orders, patches
from flexiq_jax.deployment.depthwise import Depthwise
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.deployment.wiring import Wiring
from flexiq_jax.graph import Contract, tracing
from flexiq_jax.kernels import OUTPUTS, Requantize

Array = Any


@struct.dataclass
class Deployed:
  """A deployed model; a pytree.

  Attributes:
    layers: layer name -> its weights.
    floats: path -> parameter that stays in floating point (norms, embeddings, biases elsewhere).
    levels: float32 `[L]`, the ratios at which it runs, ascending.
    wiring: everything that is no array; static.
  """

  layers: dict[str, Mixed | Plain | Depthwise]
  floats: dict[str, Array]
  levels: Array
  wiring: Wiring = struct.field(pytree_node=False)

  def __repr__(self) -> str:
    return f"Deployed({len(self.layers)} layers, {len(self.levels)} levels)"

  def level(self, ratio: float | Array) -> Array:
    """The first level that reaches a ratio, traced or not, else the last level; int32 `[]`."""
    # A ratio like 0.1 and the level made of it differ by rounding at most.
    reached = self.levels >= jnp.asarray(ratio, jnp.float32) - 1e-6
    return jnp.where(reached.any(), jnp.argmax(reached), len(self.levels) - 1).astype(jnp.int32)


def apply(deployed: Deployed, x: Any, level: Array, **kernel: Any) -> Any:
  """Runs a deployed model.

  Args:
    deployed: the model.
    x: input(s) `[B, ...]`.
    level: int32 `[]`, which of `deployed.levels`; traced, so that one executable serves all.
    **kernel: `implementation`, `platform`, `kind` and `tuned` of `kernels.mixed_matmul`.

  Returns:
    What the float model returns.
  """
  wiring = deployed.wiring
  traced = tracing.trace(wiring.apply, wiring.params, x)
  level = jnp.asarray(level, jnp.int32)
  tails = links.tails(traced)
  emitted: dict[str, Any] = {}  # consumer -> what its producer made
  ended: dict[str, Array] = {}  # layer -> its result after the tail
  batch = jax.tree.leaves(x)[0].shape[0]
  by_pixel = orders.by_pixel(deployed.layers, wiring, traced, batch, **kernel)

  def at(i, eqn, operands):
    layer, side = traced.layers[i], traced.sides[i]
    d, x = deployed.layers[layer.name], operands[1 - side]
    shape = eqn.invars[1 - side].aval.shape
    if isinstance(d, Plain):
      contract, platform = Contract(eqn, side), kernel.get("platform")
      y = layers.run_plain(d, layer, x, contract, level, wiring.dynamic, platform)
      return y.astype(eqn.outvars[0].aval.dtype)
    made = emitted.pop(layer.name, None)
    consumer = _requantize(deployed, d.feeds, level, **kernel)
    if isinstance(d, Depthwise):
      codes = depthwise.quantized(d, x) if made is None else depthwise.emitted(d, made, shape)
      contract, platform = Contract(eqn, side), kernel.get("platform")
      emitted[d.feeds] = depthwise.run(d, layer, contract, codes, consumer, platform)
      return None
    innermost = by_pixel and bool(layer.window)
    operand = _operand(d, layer, eqn, x, made, shape, level, wiring.dynamic, innermost, **kernel)
    tail, aval = tails[layer.name], tails[layer.name].out.aval
    out = aval.dtype.name if aval.dtype.name in OUTPUTS else "float32"
    window = patches.window(layer, eqn.params, shape) if d.slides else None
    if window is not None and innermost:
      window = dataclasses.replace(window, images=batch)
    y = layers.run_mixed(d, operand, level, out=out, consumer=consumer, window=window, **kernel)
    if d.feeds:
      emitted[d.feeds] = y
      return None
    y = patches.result(layer, eqn.params, y, aval.shape, innermost).astype(aval.dtype)
    if not tail.steps:
      return y
    ended[layer.name] = y
    return None

  handlers: dict[int, Callable] = dict.fromkeys(traced.layers, at)
  for layer in traced.layers.values():
    d, steps = deployed.layers[layer.name], tails[layer.name].steps
    if isinstance(d, Mixed) and not d.feeds and steps:
      handlers.update(dict.fromkeys(steps[:-1], lambda *_: None))
      handlers[steps[-1]] = lambda *_, name=layer.name: ended[name]
  leaves = [deployed.floats.get(path) for path in traced.paths]
  return tracing.evaluate(traced, [*leaves, *jax.tree.leaves(x)], handlers)


def deployed_rule(
  deployed: Deployed, x: Any, level: Array, *, out: str = "float32", **kernel: Any
) -> graph.Rule:
  """A deployed model's layers as a rule for the float model (see `rules`); nothing is fused.

  Args:
    deployed: made with `link=False`.
    x: input(s) of the size that the rule is used with.
    level: int32 `[]`.
    out: `float32`, or `int32` for the integer sums as they are, to be compared.
    **kernel: see `apply`.

  Raises:
    ValueError: a layer takes the codes or the order of another layer.
  """
  linked = [name for name, feed in deployed.wiring.feeds.items() if feed.producer]
  if linked := [*linked, *deployed.wiring.folds]:
    raise ValueError(
      f"deployed: {linked[0]} takes codes or an order from the layer before; deploy with link=False"
    )
  traced = tracing.trace(deployed.wiring.apply, deployed.wiring.params, x)
  eqns = {layer.name: traced.jaxpr.jaxpr.eqns[i] for i, layer in traced.layers.items()}
  level, dynamic = jnp.asarray(level, jnp.int32), deployed.wiring.dynamic

  def run(layer, x, w, contract):
    del w
    d, eqn = deployed.layers[layer.name], eqns[layer.name]
    if isinstance(d, Plain):
      return layers.run_plain(d, layer, x, contract, level, dynamic, kernel.get("platform"))
    assert isinstance(d, Mixed)
    operand = _operand(d, layer, eqn, x, None, x.shape, level, dynamic, **kernel)
    window = patches.window(layer, eqn.params, x.shape) if d.slides else None
    y = layers.run_mixed(d, operand, level, out=out, tail=False, window=window, **kernel)
    return patches.result(layer, eqn.params, y, eqn.outvars[0].aval.shape)

  return run


def _requantize(deployed: Deployed, name: str, level: Array, **kernel: Any) -> Requantize | None:
  """What a producer needs to make a layer's codes; None where that layer quantizes by itself."""
  if not name:
    return None
  consumer = deployed.layers[name]
  if isinstance(consumer, Depthwise):
    return consumer.requantize()
  assert isinstance(consumer, Mixed)
  # Shifts that follow the live range can be chosen only when all of it is there.
  return None if deployed.wiring.dynamic else layers.requantize(consumer, level, **kernel)


def _operand(d: Mixed, layer, eqn, x, made, shape, level, dynamic, innermost=False, **kernel):
  """The operands of a layer's matmul, from its activation or from what its producer emitted."""
  if made is None:
    x = patches.channels_last(layer, eqn.params, x)
    x = patches.by_pixel(x) if innermost else x
    return layers.quantized(d, layer, eqn.params, x, level, dynamic, innermost, **kernel)
  if dynamic:
    made = made.reshape(*shape[:-1], -1)
    return layers.quantized(d, layer, eqn.params, made, level, True)
  shape = (*shape[1:-1], shape[0]) if innermost else shape[:-1]
  return layers.lowered(d, layer, eqn.params, (made.x8, made.x4), shape, level, innermost)
