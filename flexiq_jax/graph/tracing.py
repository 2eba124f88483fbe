"""Finds the layers of a model and runs it with another way of computing them.

A model is a pure function `apply(params, x)`. It is traced to a jaxpr, calls are inlined, and every
contraction of an activation with a parameter becomes a `Layer`. Nothing here knows which library
wrote the model. See "Writing custom Jaxpr interpreters in JAX" in JAX's documentation.

A variable is *static* when it depends on parameters and constants alone, otherwise *dynamic* (see
`graph.origins`).
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

from flexiq_jax.graph import examples, parts
from flexiq_jax.graph.describe import (
  Contract,
  describe,
  leaf_paths,
  why_not,
)
from flexiq_jax.graph.inline import inline
from flexiq_jax.graph.layer import Array, Layer
from flexiq_jax.graph.origins import (
  bind,
  is_contraction,
  needed,
  origin,
  param_side,
  propagate,
)

Apply = Callable[[Any, Any], Any]
Rule = Callable[[Layer, Array, Array, Contract], Array]


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A contraction with a parameter that is not taken as a layer."""

  param: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Traced:
  """A model's inlined jaxpr and what was found in it.

  Attributes:
    jaxpr: the flat jaxpr; its inputs are the leaves of params, then those of x.
    layers: equation number -> layer, in execution order.
    sides: equation number -> which operand (0 or 1) is the parameter.
    skipped: contractions with parameters that are no layers.
    static: variables that depend on parameters and constants alone.
    shared: layer name -> what has the same weights: another layer's name or a parameter's path.
    paths: path of each parameter leaf.
    out_tree: structure of the model's result.
  """

  jaxpr: ClosedJaxpr
  layers: Mapping[int, Layer]
  sides: Mapping[int, int]
  skipped: tuple[Skipped, ...]
  static: frozenset
  shared: Mapping[str, str]
  paths: tuple[str, ...]
  out_tree: Any


def layers(apply: Apply, params: Any, x: Any) -> tuple[Layer, ...]:
  """Layers of a model in execution order.

  Args:
    apply: pure function `(params, x) -> y`.
    params: pytree of arrays or `jax.ShapeDtypeStruct`s.
    x: example input(s) with a leading batch dimension (arrays or `ShapeDtypeStruct`s); of batch 1
      or any other size.

  Raises:
    ValueError: the model has no layer, or contracts a parameter inside while or cond or a scan that
      is too long or runs over the input.
  """
  return tuple(trace(apply, params, x).layers.values())


def skipped(apply: Apply, params: Any, x: Any) -> tuple[Skipped, ...]:
  """Contractions with a parameter that `layers` does not list, each with the reason."""
  return trace(apply, params, x).skipped


def shared(apply: Apply, params: Any, x: Any) -> dict[str, str]:
  """Layer name -> what has the same weights as that layer, where anything has.

  That is another layer's name, or the path of a parameter that is also read as it is (a table of
  tokens that is the head, too). Each such layer is quantized by itself, from the same weights.
  """
  return dict(trace(apply, params, x).shared)


def with_rule(apply: Apply, rule: Rule) -> Apply:
  """A function like `apply` whose layers are computed by `rule`.

  Args:
    apply: pure function `(params, x) -> y`.
    rule: `rule(layer, x, w, contract) -> y`, where `contract(x, w, preferred_element_type=None)`
      is the layer's own contraction. The result is cast to the dtype the model expects.

  Returns:
    `run(params, x)`; jit, vmap and grad apply to it as to `apply`. It traces the model at each
    call, so wrap it in `jax.jit`.
  """

  def run(params, x):
    return by_rule(trace(apply, params, x), jax.tree.leaves((params, x)), rule)

  return run


def weights(apply: Apply, params: Any, x: Any) -> dict[str, Array]:
  """The weight operand of every layer in execution order, `{name: w}`, `w.shape == w_shape`."""
  traced = trace(apply, params, x)

  @jax.jit
  def compute(params):
    return static_weights(traced, static_values(traced, jax.tree.leaves(params)))

  found = compute(params)  # jit sorts the keys
  return {layer.name: found[layer.name] for layer in traced.layers.values()}


def trace(apply: Apply, params: Any, x: Any) -> Traced:
  """Traces and inlines a model and finds its layers (see `layers` for arguments and errors)."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  paths = leaf_paths([keys for keys, _ in flat])
  x_leaves = jax.tree.leaves(x)
  if not x_leaves or x_leaves[0].ndim == 0:
    raise ValueError("x: expected an array with a leading batch dimension, got a scalar or nothing")
  batch = x_leaves[0].shape[0]
  closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(params, x)
  origins = [frozenset([i]) for i in range(len(paths))] + [None] * len(x_leaves)
  calls = lambda *args: inline(closed.jaxpr, closed.consts, args, origins, paths)
  flattened = jax.make_jaxpr(calls)(*jax.tree.leaves((params, x)))
  known = propagate(flattened.jaxpr, origins)
  static = frozenset(v for v, origin in known.items() if origin is not None)
  pieces, views = parts.parts(flattened.jaxpr, len(paths), static)
  size = lambda p: (math.prod(flat[p.leaf][1].shape), -p.leaf, p.index, p.rest)
  found, sides, skip, constants = {}, {}, [], 0
  for i, eqn in enumerate(flattened.jaxpr.eqns):
    side = param_side(eqn, known)
    if side is None:
      constants += (
        is_contraction(eqn) and len({origin(v, known) is None for v in eqn.invars[:2]}) == 2
      )
      continue
    part = max(pieces[eqn.invars[side]], key=size)
    reason = why_not(eqn, side)
    if reason:
      skip.append(Skipped(paths[part.leaf], reason))
    else:
      found[i], sides[i] = (eqn, part), side
  if not found:
    hint = (
      f" {constants} contraction(s) use arrays that `apply` closes over: pass them in `params`."
      if constants
      else ""
    )
    raise ValueError(
      "apply: no layer found: no contraction (dense, einsum, convolution) of the input with a "
      f"parameter.{hint}" + "".join(f" Skipped {s.param}: {s.reason}." for s in skip)
    )
  used = [part for _, part in found.values()]
  own = dict(zip(found, parts.names(flattened.jaxpr, used, pieces, paths), strict=True))
  held = [examples.FREE] * len(paths) + [_example_state(leaf, batch) for leaf in x_leaves]
  dims = examples.example_dims(flattened.jaxpr, held, batch)
  table = {
    i: describe(eqn, sides[i], *own[i], batch, dims[eqn.invars[1 - sides[i]]])
    for i, (eqn, _) in found.items()
  }
  reads = {i: [eqn.invars[1 - sides[i]]] for i, (eqn, _) in found.items()}
  read = needed(flattened.jaxpr, reads)
  kept = {parts.Part(j): p for j, p in enumerate(paths) if flattened.jaxpr.invars[j] in read}
  same = {own[i][0]: part for i, (eqn, part) in found.items() if eqn.invars[sides[i]] in views}
  tree = jax.tree.structure(out_shape)
  shares = parts.shared(same, kept)
  return Traced(flattened, table, sides, tuple(skip), static, shares, paths, tree)


def evaluate(
  traced: Traced,
  leaves: Sequence[Array | None],
  handlers: Mapping[int, Callable] | None = None,
  known: Mapping[Any, Array] | None = None,
) -> Any:
  """Runs a traced model.

  Args:
    traced: the model.
    leaves: values of the leaves of (params, x); None for a parameter that is never read.
    handlers: equation number -> `handler(i, eqn, operands)`, which computes that equation's single
      result instead; operands that were never computed are None.
    known: variables whose value is given; equations that only feed skipped ones may lack operands
      and are then left out.
  """
  handlers = handlers or {}
  env: dict[Any, Array] = dict(known or {})
  jaxpr = traced.jaxpr.jaxpr
  env.update(zip(jaxpr.constvars, traced.jaxpr.consts, strict=True))
  env.update((v, a) for v, a in zip(jaxpr.invars, leaves, strict=True) if a is not None)
  for i, eqn in enumerate(jaxpr.eqns):
    operands = [v.val if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
    if i in handlers:
      env[eqn.outvars[0]] = handlers[i](i, eqn, operands)
    elif not any(o is None for o in operands) and eqn.outvars[0] not in env:
      env.update(zip(eqn.outvars, bind(eqn, operands), strict=True))
  outs = [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]
  return jax.tree.unflatten(traced.out_tree, outs)


def by_rule(
  traced: Traced,
  leaves: Sequence[Array | None],
  rule: Rule,
  known: Mapping[Any, Array] | None = None,
) -> Any:
  """Runs a traced model with its layers computed by a rule (see `with_rule`, `evaluate`)."""

  def at(i, eqn, operands):
    layer, side = traced.layers[i], traced.sides[i]
    w, act = operands[side], operands[1 - side]
    return _call(rule, layer, act, w, Contract(eqn, side), eqn)

  return evaluate(traced, leaves, dict.fromkeys(traced.layers, at), known)


def static_values(traced: Traced, param_leaves: Sequence[Array]) -> dict[Any, Array]:
  """Values of all static variables of a traced model, from its parameters alone."""
  jaxpr = traced.jaxpr.jaxpr
  env = dict(zip(jaxpr.constvars, traced.jaxpr.consts, strict=True))
  env.update(zip(jaxpr.invars[: len(param_leaves)], param_leaves, strict=True))
  for eqn in jaxpr.eqns:
    if all(v in traced.static for v in eqn.outvars):
      operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
      env.update(zip(eqn.outvars, bind(eqn, operands), strict=True))
  return env


def static_weights(traced: Traced, values: Mapping[Any, Array]) -> dict[str, Array]:
  """Picks the layers' weight operands, `{name: w}`, out of `static_values`."""
  eqns = traced.jaxpr.jaxpr.eqns
  return {layer.name: values[eqns[i].invars[traced.sides[i]]] for i, layer in traced.layers.items()}


def closest(name: str, known: Sequence[str], n: int = 5) -> str:
  """The names most like `name`, for error messages."""
  near = difflib.get_close_matches(name, known, n=n, cutoff=0.0)
  return ", ".join(near)


def _call(rule, layer, x, w, contract, eqn):
  aval = eqn.outvars[0].aval
  with jax.named_scope(layer.name):  # so that profiles and compiled programs name it
    y = rule(layer, x, w, contract)
  if y.shape != aval.shape:
    raise ValueError(f"rule: result of layer {layer.name} has shape {y.shape}, not {aval.shape}")
  return y.astype(aval.dtype)


def _example_state(leaf: Any, batch: int) -> int:
  """Which dimension of an input holds the examples (see `graph.examples`)."""
  if leaf.ndim == 0:
    return examples.FREE
  return 0 if leaf.shape[0] == batch else examples.UNKNOWN
