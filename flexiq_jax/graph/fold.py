"""Folds inference batch norm into the weights and a bias of the layer before it.

Behind a layer's result y, the pass follows elementwise equations whose other operand is static and
varies over output channels only (subtract the mean, multiply by scale / sqrt(variance + eps), add
the bias, layer scale, a plain bias). Together they are `a * y + b`, so that

    w' = w * a   (per output channel),   y' = contract(x, w') + b.

Scores and scales are measured on w', after the normalisation (docs/flexiq.md, step A).
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from flexiq_jax.graph import tracing
from flexiq_jax.graph.describe import Contract
from flexiq_jax.graph.layer import Array, Layer
from flexiq_jax.graph.origins import aval, needed

_LINEAR = ("add", "sub", "mul", "div")
_ROOTS = ("rsqrt", "sqrt", "pow")


@dataclasses.dataclass(frozen=True)
class _Chain:
  """Elementwise equations after a layer: `steps` are (equation, operand that carries y)."""

  steps: tuple[tuple[int, int], ...]
  out: Any  # the variable that holds a * y + b


def fold_batch_norm(apply: tracing.Apply, params: Any, x: Any) -> tuple[tracing.Apply, dict]:
  """Folds batch norm, and any other per-channel affine map, into the layers.

  Args:
    apply: pure function `(params, x) -> y` in inference mode.
    params: pytree of arrays, batch statistics included.
    x: example input with a leading batch dimension (array or `jax.ShapeDtypeStruct`).

  Returns:
    `(folded_apply, folded_params)`, a model with the same results up to rounding (1e-5 relative in
    float32) and the same layer names. `folded_params` is a nested dict: for each layer `kernel`
    (at the path `layer.param`; shape `layer.w_shape`, float32) and, where anything was folded,
    `bias` `[N]`; then the parameters still read elsewhere, under their old paths, or with `:float`
    after it where a layer has that path. Layers that shared a parameter each have a copy.

  Raises:
    ValueError: see `graph.layers`.
  """
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  traced = tracing.trace(apply, params, x)
  chains = _chains(traced)

  @jax.jit
  def fold(leaves):
    values = tracing.static_values(traced, leaves)
    kernels = tracing.static_weights(traced, values)
    folded = {}
    for i, layer in traced.layers.items():
      a, b = _affine(traced, chains[i], values, layer)
      w = kernels[layer.name].astype(jnp.float32)
      kernel, bias = _keys(layer)
      folded[kernel] = w if a is None else w * _out_vector(layer, a)
      if b is not None:
        folded[bias] = b
    return folded

  folded = fold(jax.tree.leaves(params))
  # What is also read as it is (a table of tokens that is the head, too) gets a path of its own.
  taken = {p for path in folded for p in itertools.accumulate(path.split("/"), "{}/{}".format)}
  read = sorted(_kept(traced, chains))
  kept = {i: traced.paths[i] + ":float" * (traced.paths[i] in taken) for i in read}
  leaves = jax.tree.leaves(params)
  flat = {path: leaves[i] for i, path in kept.items()}

  def folded_apply(folded_params, x):
    traced = tracing.trace(apply, abstract, x)
    chains = _chains(traced)
    given = {
      "/".join(str(k.key) for k in keys): leaf
      for keys, leaf in jax.tree_util.tree_flatten_with_path(folded_params)[0]
    }

    def at(i, eqn, operands):
      layer, side = traced.layers[i], traced.sides[i]
      kernel, _ = _keys(layer)
      dtype = eqn.invars[side].aval.dtype
      act = operands[1 - side]
      return Contract(eqn, side)(act, given[kernel].astype(dtype))

    def end(i, layer):
      def finish(_, eqn, operands):
        y = operands[chains[i].steps[-1][1]]
        bias = layer.y_vector(given[_keys(layer)[1]], y.shape)
        aval = eqn.outvars[0].aval
        return (y.astype(jnp.float32) + bias).astype(aval.dtype)

      return finish

    handlers: dict[int, Callable] = dict.fromkeys(traced.layers, at)
    for i, layer in traced.layers.items():
      steps = chains[i].steps
      for number, operand in steps:
        handlers[number] = lambda _, eqn, operands, operand=operand: operands[operand]
      if steps:
        handlers[steps[-1][0]] = end(i, layer)
    # A parameter of a layer that was folded away must not be read in its stead.
    params_in = [given[kept[i]] if i in kept else None for i in range(len(traced.paths))]
    return tracing.evaluate(traced, [*params_in, *jax.tree.leaves(x)], handlers)

  return folded_apply, _nest({**flat, **folded})


def batch_normed(apply: tracing.Apply, params: Any, x: Any) -> tuple[str, ...]:
  """Names of the layers after which batch norm is folded, in execution order.

  Args:
    apply: pure function `(params, x) -> y` in inference mode, not folded.
    params: pytree of arrays, batch statistics included.
    x: example input with a leading batch dimension (array or `jax.ShapeDtypeStruct`).

  Returns:
    Those whose folded arithmetic takes a square root of parameters, as of a variance; a bias and a
    layer scale do not.
  """
  traced = tracing.trace(apply, params, x)
  jaxpr, chains = traced.jaxpr.jaxpr, _chains(traced)
  rooted: set[Any] = set()  # static variables that a square root went into
  for eqn in jaxpr.eqns:
    if traced.static.issuperset(eqn.outvars):
      inner = (v for v in eqn.invars if not isinstance(v, Literal))
      if eqn.primitive.name in _ROOTS or not rooted.isdisjoint(inner):
        rooted.update(eqn.outvars)

  def normed(i: int) -> bool:
    others = (jaxpr.eqns[number].invars[1 - y] for number, y in chains[i].steps)
    return any(not isinstance(v, Literal) and v in rooted for v in others)

  return tuple(layer.name for i, layer in traced.layers.items() if normed(i))


def _keys(layer: Layer) -> tuple[str, str]:
  """Paths of a folded layer's weights and bias."""
  module = layer.param.rpartition("/")[0]
  if not module or layer.param.endswith(layer.name):  # the name is the parameter itself
    return layer.param, f"{layer.param}_bias"
  return layer.param, f"{module}/bias"


def _chains(traced: tracing.Traced) -> dict[int, _Chain]:
  """The affine chain after every layer (equation number -> chain, possibly empty)."""
  jaxpr = traced.jaxpr.jaxpr
  uses = collections.defaultdict(list)
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.invars:
      if not isinstance(v, Literal):
        uses[v].append(i)
  results = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
  chains = {}
  for i, layer in traced.layers.items():
    y, steps = jaxpr.eqns[i].outvars[0], []
    pending = []
    while len(uses[y]) == 1 and y not in results:
      number = uses[y][0]
      eqn = jaxpr.eqns[number]
      operand = _affine_operand(eqn, y, layer, traced, makers)
      if operand is None:
        break
      pending.append((number, operand))
      y = eqn.outvars[0]
      if eqn.primitive.name in _LINEAR:  # a trailing cast belongs to what follows
        steps += pending
        pending = []
    out = jaxpr.eqns[steps[-1][0]].outvars[0] if steps else jaxpr.eqns[i].outvars[0]
    chains[i] = _Chain(tuple(steps), out)
  return chains


def _affine_operand(eqn: JaxprEqn, y, layer: Layer, traced, makers) -> int | None:
  """Which operand of a per-channel affine equation carries y; None for any other equation."""
  if eqn.primitive.name == "convert_element_type":
    return 0 if jnp.issubdtype(aval(eqn.outvars[0]).dtype, jnp.floating) else None
  if eqn.primitive.name not in _LINEAR or aval(eqn.outvars[0]).shape != aval(y).shape:
    return None
  operand = 0 if eqn.invars[0] is y else 1
  other = eqn.invars[1 - operand]
  if eqn.primitive.name == "div" and operand == 1:
    return None
  if isinstance(other, Literal):
    return operand
  if other not in traced.static:
    return None
  _, shape = _source(other, makers)
  per_channel = all(n == 1 or d in layer.y_dims for d, n in enumerate(shape))
  return operand if per_channel else None


def _source(v, makers) -> tuple[Any, tuple[int, ...]]:
  """Looks through a broadcast: the variable behind it and its shape in the broadcast's rank."""
  eqn = makers.get(v)
  if eqn is None or eqn.primitive.name != "broadcast_in_dim":
    return v, tuple(v.aval.shape)
  shape = [1] * len(v.aval.shape)
  inner = eqn.invars[0]
  for d, n in zip(eqn.params["broadcast_dimensions"], inner.aval.shape, strict=True):
    shape[d] = n
  return inner, tuple(shape)


def _affine(traced, chain: _Chain, values: Mapping[Any, Array], layer: Layer):
  """`(a [N] or None, b [N] or None)` of a chain, from the values of the static variables."""
  jaxpr = traced.jaxpr.jaxpr
  makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
  if not chain.steps:
    return None, None
  n = layer.out_channels
  a, b = jnp.ones(n, jnp.float32), jnp.zeros(n, jnp.float32)
  shape = chain.out.aval.shape
  wanted = [shape[d] if d in layer.y_dims else 1 for d in range(len(shape))]
  for number, operand in chain.steps:
    eqn = jaxpr.eqns[number]
    name = eqn.primitive.name
    if name == "convert_element_type":
      continue
    other = eqn.invars[1 - operand]
    if isinstance(other, Literal):
      s = jnp.full(n, other.val, jnp.float32)
    else:
      inner, inner_shape = _source(other, makers)
      s = jnp.broadcast_to(values[inner].astype(jnp.float32).reshape(inner_shape), wanted)
      s = s.reshape(n)
    if name == "mul":
      a, b = a * s, b * s
    elif name == "div":
      a, b = a / s, b / s
    elif name == "add":
      b = b + s
    elif operand == 0:
      b = b - s
    else:
      a, b = -a, s - b
  return a, b


def _out_vector(layer: Layer, a: Array) -> Array:
  """Per-output-channel values `[N]` -> an array that broadcasts against w."""
  per = layer.out_channels // layer.groups
  g = layer.groups
  full = jnp.broadcast_to(a.reshape(g, 1, 1, per), (g, layer.in_channels // g, _window(layer), per))
  return layer.native(full)


def _window(layer: Layer) -> int:
  n = 1
  for k in layer.window:
    n *= k
  return n


def _kept(traced: tracing.Traced, chains: Mapping[int, _Chain]) -> set[int]:
  """Parameter leaves that are still read once layers bring weights and biases of their own."""
  jaxpr = traced.jaxpr.jaxpr
  only = {i: [jaxpr.eqns[i].invars[1 - side]] for i, side in traced.sides.items()}
  for chain in chains.values():
    only.update({number: [jaxpr.eqns[number].invars[y]] for number, y in chain.steps})
  read = needed(jaxpr, only)
  return {i for i, v in enumerate(jaxpr.invars[: len(traced.paths)]) if v in read}


def _nest(flat: Mapping[str, Array]) -> dict:
  """`{'a/b': v}` -> `{'a': {'b': v}}`."""
  tree: dict = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree
