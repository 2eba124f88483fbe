"""The deployed model: packed integer weights, and a level that is a number on the device.

    deployed = deploy.deploy(model, images[:1])
    run = jax.jit(deploy.apply)
    logits = run(deployed, images, deployed.level(0.5))

The model's own jaxpr runs, with every layer computed by the mixed matmul (`deploy.layers`). Where
one layer feeds one other (`deploy.links`), the first emits the codes of the second, and no
activation of theirs is ever a float. One executable serves all levels; a level is an index into
the arrays that depend on it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.core import Literal

from flexiq_jax import flexiq as flexiqs
from flexiq_jax import graph
from flexiq_jax.deploy import layers as deployed_layers
from flexiq_jax.deploy import layout as layouts
from flexiq_jax.deploy import links, patches
from flexiq_jax.deploy.layers import Mixed, Plain
from flexiq_jax.graph import trace as tracing
from flexiq_jax.graph.describe import contraction
from flexiq_jax.selection.recipe import LEVELS

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
  """What of a deployed model is no array.

  Attributes:
    apply: the float model with batch norm folded, `(params, x) -> y`.
    params: its parameters, shapes alone.
    feeds: layer name -> the layer that emits its codes, or why there is none.
    dynamic: whether activation shifts are chosen at run time.
  """

  apply: graph.Apply
  params: Any
  feeds: Mapping[str, links.Feed]
  dynamic: bool = False


@struct.dataclass
class Deployed:
  """A deployed model; a pytree.

  Attributes:
    layers: layer name -> its weights.
    floats: path -> parameter that stays in floating point (norms, embeddings, biases elsewhere).
    levels: float32 `[L]`, the ratios at which it runs, ascending.
    plan: the rest; static.
  """

  layers: dict[str, Mixed | Plain]
  floats: dict[str, Array]
  levels: Array
  plan: Plan = struct.field(pytree_node=False)

  def level(self, ratio: float | Array) -> Array:
    """The first level that reaches a ratio, else the last; int32 `[]`; traced ratios, too."""
    # A ratio like 0.1 and the level made of it differ by rounding at most.
    reached = self.levels >= jnp.asarray(ratio, jnp.float32) - 1e-6
    return jnp.where(reached.any(), jnp.argmax(reached), len(self.levels) - 1).astype(jnp.int32)


def deploy(
  model: flexiqs.FlexiQ,
  x: Any,
  *,
  levels: Sequence[float] = LEVELS,
  link: bool = True,
  granule: int = 2,
) -> Deployed:
  """Packs a FlexiQ model for the mixed matmul.

  Args:
    model: the model; lowered with shift blocks where a kernel wants them.
    x: example input(s) with a leading batch dimension (arrays or `jax.ShapeDtypeStruct`s).
    levels: ratios at which it is to run.
    link: fold channel orders into producers and let them emit codes; False gathers everywhere,
      which `deployed_rule` needs.
    granule: rows of K that a shift block is a multiple of: even for the reference, 128 for TPUs.

  Raises:
    ValueError: levels that do not ascend within 0..1; see `layout.lay_out` and `layout.pack`.
  """
  levels = tuple(float(r) for r in levels)
  if not levels or list(levels) != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= 1:
    raise ValueError(f"levels: {levels}; ascending numbers in 0..1 are accepted")
  network, schedule = model.network, model.schedule
  params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), network.params)
  traced = tracing.trace(network.apply, params, x)
  tails = links.tails(traced)
  low = {name for name, q in model.model.items() if q.low is not None}
  plan = make_plan(network.apply, params, x, low, link=link, dynamic=model.dynamic)
  order = schedule.layer_order()
  counts = [schedule.boundaries(r) for r in levels]
  per_level = {name: [c[name] for c in counts] for name in order}
  mixed = _mixed_layers(traced, low)
  laid = {
    name: layouts.lay_out(layer, _low(model, name), order[name], granule)
    for name, layer in mixed.items()
  }
  consumers = {f.producer: name for name, f in plan.feeds.items() if f.producer}
  values = tracing.static_values(traced, jax.tree.leaves(network.params))
  made: dict[str, Mixed | Plain] = {}
  for layer in traced.layers.values():
    name, q = layer.name, model.model[layer.name]
    if name not in mixed:
      made[name] = _plain(q, order.get(name), per_level.get(name))
      continue
    consumer = consumers.get(name)
    outputs = laid[consumer].order if consumer else None
    pick = lambda v, outputs=outputs: v if outputs is None else np.where(outputs < 0, 0, v[outputs])
    tail, lay = tails[name], laid[name]
    bias = None
    if tail.bias is not None:
      bias = jnp.asarray(pick(np.asarray(values[tail.bias], np.float32).reshape(-1)))
    made[name] = Mixed(
      weights=layouts.pack(layer, q, lay, outputs),
      x_scale=jnp.asarray(q.x_scale, jnp.float32),
      order=None if plan.feeds[name].producer else jnp.asarray(lay.order),
      places=jnp.asarray([lay.places[c] for c in per_level[name]], jnp.int32),
      # Multiplied as the rules do, by the same product.
      scale=jnp.asarray(pick(np.asarray(q.w_scale * q.x_scale, np.float32))),
      correction=jnp.asarray(
        layouts.corrections(layer, q, lay, per_level[name], outputs, model.dynamic)
      ),
      bias=bias,
      channels=lay.channels,
      signed=q.signed,
      activation=tail.activation,
      feeds=consumer or "",
    )
  leaves = dict(zip(traced.paths, jax.tree.leaves(network.params), strict=True))
  floats = {path: leaves[path] for path in _still_read(traced, tails, mixed)}
  return Deployed(made, floats, jnp.asarray(levels, jnp.float32), plan)


def fold_shapes(apply: graph.Apply, params: Any, x: Any) -> tuple[graph.Apply, Any]:
  """`graph.fold_batch_norm` without values: the folded model and the shapes of its parameters.

  Args:
    apply: the float model.
    params: its parameters or their shapes.
    x: example input(s).
  """
  found = []

  def fold(params):
    folded, values = graph.fold_batch_norm(apply, params, x)
    found.append(folded)
    return values

  shapes = jax.eval_shape(fold, params)
  return found[0], shapes


def make_plan(
  apply: graph.Apply,
  params: Any,
  x: Any,
  low: set[str],
  *,
  link: bool = True,
  dynamic: bool = False,
) -> Plan:
  """The static side of a deployed model; needs no parameter values.

  Args:
    apply: the float model with batch norm folded.
    params: its parameters or their shapes.
    x: example input(s).
    low: names of the layers that have a 4-bit side.
    link: see `deploy`.
    dynamic: whether activation shifts are chosen at run time.
  """
  params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  traced = tracing.trace(apply, params, x)
  mixed = _mixed_layers(traced, low)
  feeds = links.feeds(traced, links.tails(traced), mixed)
  for name, feed in feeds.items():
    if name not in mixed:
      kind = "grouped or depthwise" if name in low else "8-bit at every level"
      feeds[name] = links.Feed(producer=None, reason=f"runs without a kernel: {kind}")
    elif not link and feed.producer:
      feeds[name] = links.Feed(producer=None, reason="links are turned off")
  return Plan(apply=apply, params=params, feeds=feeds, dynamic=dynamic)


def apply(deployed: Deployed, x: Any, level: Array, **kernel: Any) -> Any:
  """Runs a deployed model.

  Args:
    deployed: the model.
    x: input(s) `[B, ...]`.
    level: int32 `[]`, which of `deployed.levels`; traced, so that one executable serves all.
    **kernel: `implementation` and `platform` of the mixed matmul (see `kernels.api`).

  Returns:
    What the float model returns.
  """
  plan = deployed.plan
  traced = tracing.trace(plan.apply, plan.params, x)
  level = jnp.asarray(level, jnp.int32)
  tails = links.tails(traced)
  emitted: dict[str, Any] = {}  # consumer -> what its producer made
  ended: dict[str, Array] = {}  # layer -> its result behind the tail

  def at(i, eqn, operands):
    layer, side = traced.layers[i], traced.sides[i]
    d, activation = deployed.layers[layer.name], operands[1 - side]
    if isinstance(d, Plain):
      y = deployed_layers.run_plain(
        d, layer, activation, contraction(eqn, side), level, plan.dynamic
      )
      return y.astype(eqn.outvars[0].aval.dtype)
    operand = _operand(d, layer, eqn, eqn.invars[1 - side].aval, activation, emitted, level, plan)
    if not d.feeds:
      y = deployed_layers.run_mixed(d, operand, level, **kernel)
      aval = tails[layer.name].out.aval
      y = patches.result(layer, eqn.params, y, aval.shape).astype(aval.dtype)
      if not tails[layer.name].steps:
        return y
      ended[layer.name] = y
      return None
    consumer = None if plan.dynamic else deployed.layers[d.feeds]
    assert not isinstance(consumer, Plain)
    emitted[d.feeds] = deployed_layers.run_mixed(d, operand, level, consumer=consumer, **kernel)
    return None

  handlers: dict[int, Callable] = dict.fromkeys(traced.layers, at)
  for layer in traced.layers.values():
    d = deployed.layers[layer.name]
    steps = tails[layer.name].steps
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
    ValueError: a layer emits another one's codes.
  """
  if linked := [n for n, d in deployed.layers.items() if isinstance(d, Mixed) and d.order is None]:
    raise ValueError(
      f"deployed: {linked[0]} takes codes from the layer before; deploy with link=False"
    )
  traced = tracing.trace(deployed.plan.apply, deployed.plan.params, x)
  eqns = {layer.name: traced.jaxpr.jaxpr.eqns[i] for i, layer in traced.layers.items()}
  level = jnp.asarray(level, jnp.int32)

  def run(layer, x, w, contract):
    del w
    d, eqn = deployed.layers[layer.name], eqns[layer.name]
    if isinstance(d, Plain):
      return deployed_layers.run_plain(d, layer, x, contract, level, deployed.plan.dynamic)
    operand = _operand(d, layer, eqn, x, x, {}, level, deployed.plan)
    y = deployed_layers.run_mixed(d, operand, level, out=out, tail=False, **kernel)
    return patches.result(layer, eqn.params, y, eqn.outvars[0].aval.shape)

  return run


def _operand(d, layer, eqn, spec, activation, emitted, level, plan):
  """The operands of a layer's matmul, from its activation or from what its producer emitted."""
  if d.order is not None:
    x = patches.channels_last(layer, eqn.params, activation)
    return deployed_layers.quantized(d, layer, eqn.params, x, level, plan.dynamic)
  made, shape = emitted.pop(layer.name), spec.shape[:-1]
  if plan.dynamic:
    return deployed_layers.quantized(d, layer, eqn.params, made.reshape(*shape, -1), level, True)
  return deployed_layers.lowered(d, layer, eqn.params, (made.x8, made.x4), shape, level)


def _mixed_layers(traced: tracing.Traced, low: set[str]) -> dict[str, graph.Layer]:
  """The layers that run on the mixed matmul."""
  eqns = traced.jaxpr.jaxpr.eqns
  return {
    layer.name: layer
    for i, layer in traced.layers.items()
    if layer.name in low and patches.supported(layer, eqns[i])
  }


def _plain(q, order, counts) -> Plain:
  """A layer without a kernel; its float weights' 4-bit side is kept where it is used."""
  if q.low is None:
    return Plain(q)
  masks = np.zeros((len(counts), len(order)), bool)
  for row, count in zip(masks, counts, strict=True):
    row[order[:count]] = True
  return Plain(q, jnp.asarray(masks))


def _low(model, name):
  low = model.model[name].low
  assert low is not None
  return low


def _still_read(traced: tracing.Traced, tails, mixed) -> list[str]:
  """Paths of the parameters that are read outside of layers and their tails."""
  jaxpr = traced.jaxpr.jaxpr
  needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  biases = {n: tails[name].bias for name in mixed for n in tails[name].steps[:1]}
  for i in reversed(range(len(jaxpr.eqns))):
    eqn = jaxpr.eqns[i]
    if needed.isdisjoint(eqn.outvars):
      continue
    skip = eqn.invars[traced.sides[i]] if i in traced.layers else biases.get(i)
    needed.update(v for v in eqn.invars if not isinstance(v, Literal) and v is not skip)
  params = zip(traced.paths, jaxpr.invars, strict=False)
  return [path for path, v in params if v in needed]
