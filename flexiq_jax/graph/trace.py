"""Finds the layers of a model and runs it with another way of computing them.

A model is a pure function `apply(params, x)`. It is traced to a jaxpr, calls are inlined, and every
contraction of an activation with a parameter becomes a `Layer`. Nothing here knows which library
wrote the model. See "Writing custom Jaxpr interpreters in JAX" in JAX's documentation.

Vocabulary: a variable is *static* when it depends on parameters and constants alone (then it
carries the set of parameters it derives from), otherwise *dynamic*.
"""

import collections
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as prim

from flexiq_jax.graph.layer import Array, Layer

Apply = Callable[[Any, Any], Any]
Contract = Callable[..., Array]
Rule = Callable[[Layer, Array, Array, Contract], Array]

# Calls that only wrap a jaxpr, and the parameter that holds it.
_TRANSPARENT = {prim.jit_p: "jaxpr", prim.closed_call_p: "call_jaxpr", prim.call_p: "call_jaxpr"}
# Calls with a derivative rule of their own: left whole unless a layer is inside.
_WRAPPED = {
  prim.custom_jvp_call_p: "call_jaxpr",
  prim.custom_vjp_call_p: "call_jaxpr",
  prim.remat_p: "jaxpr",
}
# Contractions that no rule can take over.
_OTHER_CONTRACTIONS = ("ragged_dot", "ragged_dot_general", "scaled_matmul")

# What a static variable derives from (parameter leaf numbers); None marks a dynamic variable.
_Origin = frozenset[int] | None


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
    paths: path of each parameter leaf.
    out_tree: structure of the model's result.
  """

  jaxpr: ClosedJaxpr
  layers: Mapping[int, Layer]
  sides: Mapping[int, int]
  skipped: tuple[Skipped, ...]
  static: frozenset
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
    ValueError: the model has no layer, uses a parameter in two layers, or contracts a parameter
      inside scan, while or cond.
  """
  return tuple(trace(apply, params, x).layers.values())


def skipped(apply: Apply, params: Any, x: Any) -> tuple[Skipped, ...]:
  """Contractions with a parameter that `layers` does not list, each with the reason."""
  return trace(apply, params, x).skipped


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
    traced = trace(apply, params, x)
    leaves = jax.tree.leaves((params, x))

    def at(i, eqn, operands):
      layer, side = traced.layers[i], traced.sides[i]
      w, act = operands[side], operands[1 - side]
      return _call(rule, layer, act, w, contraction(eqn, side), eqn)

    return evaluate(traced, leaves, dict.fromkeys(traced.layers, at))

  return run


def weights(apply: Apply, params: Any, x: Any) -> dict[str, Array]:
  """The weight operand of every layer, `{name: w}` with `w.shape == layer.w_shape`."""
  traced = trace(apply, params, x)

  @jax.jit
  def compute(params):
    return static_weights(traced, static_values(traced, jax.tree.leaves(params)))

  return compute(params)


def trace(apply: Apply, params: Any, x: Any) -> Traced:
  """Traces and inlines a model and finds its layers (see `layers` for arguments and errors)."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  paths = tuple(_path(keys) for keys, _ in flat)
  x_leaves = jax.tree.leaves(x)
  if not x_leaves or x_leaves[0].ndim == 0:
    raise ValueError("x: expected an array with a leading batch dimension, got a scalar or nothing")
  closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(params, x)
  origins = [frozenset([i]) for i in range(len(paths))] + [None] * len(x_leaves)
  closed = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args, origins))(
    *jax.tree.leaves((params, x))
  )
  known = _propagate(closed.jaxpr, origins)
  sizes = [math.prod(leaf.shape) for _, leaf in flat]
  found, sides, skip, constants = {}, {}, [], 0
  for i, eqn in enumerate(closed.jaxpr.eqns):
    side = _param_side(eqn, known)
    if side is None:
      constants += (
        _is_contraction(eqn) and len({_origin(v, known) is None for v in eqn.invars}) == 2
      )
      continue
    param = max(_origin(eqn.invars[side], known), key=lambda j: (sizes[j], -j))
    reason = _why_not(eqn, side)
    if reason:
      skip.append(Skipped(paths[param], reason))
    else:
      found[i], sides[i] = (eqn, param), side
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
  used = collections.Counter(param for _, param in found.values())
  if twice := [paths[p] for p, n in used.items() if n > 1]:
    raise ValueError(
      f"params: {', '.join(twice)}: used by more than one layer. Each layer needs a parameter of "
      "its own, because scales and channel groups belong to one input; copy the parameter."
    )
  names = _names([paths[param] for _, param in found.values()])
  batch = x_leaves[0].shape[0]
  table = {
    i: _describe(eqn, sides[i], names[paths[param]], paths[param], batch)
    for i, (eqn, param) in found.items()
  }
  static = frozenset(v for v, origin in known.items() if origin is not None)
  return Traced(closed, table, sides, tuple(skip), static, paths, jax.tree.structure(out_shape))


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
      env.update(zip(eqn.outvars, _bind(eqn, operands), strict=True))
  outs = [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]
  return jax.tree.unflatten(traced.out_tree, outs)


def static_values(traced: Traced, param_leaves: Sequence[Array]) -> dict[Any, Array]:
  """Values of all static variables of a traced model, from its parameters alone."""
  jaxpr = traced.jaxpr.jaxpr
  env = dict(zip(jaxpr.constvars, traced.jaxpr.consts, strict=True))
  env.update(zip(jaxpr.invars[: len(param_leaves)], param_leaves, strict=True))
  for eqn in jaxpr.eqns:
    if all(v in traced.static for v in eqn.outvars):
      operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
      env.update(zip(eqn.outvars, _bind(eqn, operands), strict=True))
  return env


def static_weights(traced: Traced, values: Mapping[Any, Array]) -> dict[str, Array]:
  """Picks the layers' weight operands, `{name: w}`, out of `static_values`."""
  eqns = traced.jaxpr.jaxpr.eqns
  return {layer.name: values[eqns[i].invars[traced.sides[i]]] for i, layer in traced.layers.items()}


def contraction(eqn: JaxprEqn, side: int) -> Contract:
  """The contraction of an equation as `contract(x, w, preferred_element_type=None)`."""
  p = eqn.params

  def contract(x, w, preferred_element_type=None):
    lhs, rhs = (w, x) if side == 0 else (x, w)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if preferred_element_type is None and floating:
      preferred_element_type = p["preferred_element_type"]
    precision = p["precision"] if floating else None
    if eqn.primitive is prim.dot_general_p:
      return lax.dot_general(
        lhs,
        rhs,
        p["dimension_numbers"],
        precision=precision,
        preferred_element_type=preferred_element_type,
      )
    return lax.conv_general_dilated(
      lhs,
      rhs,
      p["window_strides"],
      p["padding"],
      p["lhs_dilation"],
      p["rhs_dilation"],
      p["dimension_numbers"],
      p["feature_group_count"],
      p["batch_group_count"],
      precision,
      preferred_element_type,
    )

  return contract


def closest(name: str, known: Sequence[str], n: int = 5) -> str:
  """The names most like `name`, for error messages."""
  near = difflib.get_close_matches(name, known, n=n, cutoff=0.0)
  return ", ".join(near)


def _call(rule, layer, x, w, contract, eqn):
  aval = eqn.outvars[0].aval
  y = rule(layer, x, w, contract)
  if y.shape != aval.shape:
    raise ValueError(f"rule: result of layer {layer.name} has shape {y.shape}, not {aval.shape}")
  return y.astype(aval.dtype)


def _bind(eqn: JaxprEqn, operands: Sequence[Array]) -> Sequence[Array]:
  out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
  return out if eqn.primitive.multiple_results else [out]


def _inline(jaxpr: Jaxpr, consts, args, origins: Sequence[_Origin]) -> list[Array]:
  """Evaluates a jaxpr with its calls inlined, so that tracing this gives the flat jaxpr."""
  known = _propagate(jaxpr, origins)
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for eqn in jaxpr.eqns:
    operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
    inputs = [_origin(v, known) for v in eqn.invars]
    key = _TRANSPARENT.get(eqn.primitive) or _WRAPPED.get(eqn.primitive)
    if key and (eqn.primitive in _TRANSPARENT or _holds_layer(eqn, inputs)):
      inner = _open(eqn.params[key])
      outs = _inline(inner[0], inner[1], operands, inputs)
    else:
      if not key and _holds_layer(eqn, inputs):
        raise ValueError(
          f"apply: a parameter is contracted inside `{eqn.primitive.name}`. Its repetitions would "
          "share one scale and one channel order; unroll it (a Python loop, or "
          "`nn.scan`/`nnx.scan` replaced by a list of layers)."
        )
      outs = _bind(eqn, operands)
    env.update(zip(eqn.outvars, outs, strict=True))
  return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _origin(v, known: Mapping[Any, _Origin]) -> _Origin:
  return frozenset() if isinstance(v, Literal) else known[v]


def _propagate(jaxpr: Jaxpr, origins: Sequence[_Origin]) -> dict[Any, _Origin]:
  """Origin of every variable of a jaxpr, given those of its inputs."""
  known: dict[Any, _Origin] = dict.fromkeys(jaxpr.constvars, frozenset())
  known.update(zip(jaxpr.invars, origins, strict=True))
  for eqn in jaxpr.eqns:
    inputs = [_origin(v, known) for v in eqn.invars]
    out = None if None in inputs else frozenset().union(*inputs)
    known.update(dict.fromkeys(eqn.outvars, out))
  return known


def _is_contraction(eqn: JaxprEqn) -> bool:
  return eqn.primitive in (prim.dot_general_p, prim.conv_general_dilated_p) or (
    eqn.primitive.name in _OTHER_CONTRACTIONS
  )


def _param_side(eqn: JaxprEqn, known: Mapping[Any, _Origin]) -> int | None:
  """Which of the first two operands is a parameter contracted with a dynamic one, if any."""
  if not _is_contraction(eqn):
    return None
  left, right = (_origin(v, known) for v in eqn.invars[:2])
  if left and right is None:
    return 0
  return 1 if right and left is None else None


def _inner_jaxprs(eqn: JaxprEqn, inputs) -> Iterator[tuple[Jaxpr, list[_Origin]]]:
  """The jaxprs in an equation's parameters with the origins of their inputs."""
  name, p = eqn.primitive.name, eqn.params
  if name == "while":
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body, carry = p["body_jaxpr"].jaxpr, inputs[n_cond + n_body :]
    consts = inputs[n_cond : n_cond + n_body]
    carry = _settle(body, consts, carry, [])
    yield body, [*consts, *carry]
    yield p["cond_jaxpr"].jaxpr, [*inputs[:n_cond], *carry]
    return
  if name == "scan":
    body, n, m = p["jaxpr"].jaxpr, p["num_consts"], p["num_carry"]
    carry = _settle(body, inputs[:n], inputs[n : n + m], inputs[n + m :])
    yield body, [*inputs[:n], *carry, *inputs[n + m :]]
    return
  for value in p.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (Jaxpr, ClosedJaxpr)):
        inner = _open(item)[0]
        given = inputs[1:] if name == "cond" else inputs
        if len(given) == len(inner.invars):
          yield inner, list(given)


def _settle(body: Jaxpr, consts, carry, xs) -> list[_Origin]:
  """Origins of a loop's carry once further rounds no longer change them."""
  carry = list(carry)
  while True:
    known = _propagate(body, [*consts, *carry, *xs])
    outs = [_origin(v, known) for v in body.outvars[: len(carry)]]
    merged = [None if a is None or b is None else a | b for a, b in zip(carry, outs, strict=True)]
    if merged == carry:
      return carry
    carry = merged


def _holds_layer(eqn: JaxprEqn, inputs: Sequence[_Origin]) -> bool:
  """Whether a contraction of a parameter with an activation lies inside an equation."""
  for inner, origins in _inner_jaxprs(eqn, list(inputs)):
    known = _propagate(inner, origins)
    for e in inner.eqns:
      if _param_side(e, known) is not None:
        return True
      if _holds_layer(e, [_origin(v, known) for v in e.invars]):
        return True
  return False


def _why_not(eqn: JaxprEqn, side: int) -> str | None:
  """Why a contraction with a parameter cannot be a layer; None if it can."""
  if eqn.primitive is prim.conv_general_dilated_p:
    if side == 0:
      return "the parameter is the convolution's input, not its kernel"
    if eqn.params["batch_group_count"] != 1:
      return "batch_group_count is not 1"
    return None
  if eqn.primitive is not prim.dot_general_p:
    return f"`{eqn.primitive.name}` is not supported"
  (contract, _), _ = eqn.params["dimension_numbers"]
  if not contract:
    return "an outer product: no dimension is summed over"
  dtype = eqn.invars[1 - side].aval.dtype
  if not jnp.issubdtype(dtype, jnp.floating):
    return f"its activation is {dtype}, not floating point"
  return None


def _describe(eqn: JaxprEqn, side: int, name: str, param: str, batch: int) -> Layer:
  """Static facts of a layer from its equation."""
  w, x, y = eqn.invars[side].aval, eqn.invars[1 - side].aval, eqn.outvars[0].aval
  p = eqn.params
  if eqn.primitive is prim.dot_general_p:
    contract, shared = ((d[side], d[1 - side]) for d in p["dimension_numbers"])
    (w_in, x_in), (w_group, x_group) = contract, shared
    w_out = tuple(d for d in range(w.ndim) if d not in (*w_in, *w_group))
    n = len(w_group)
    first = n if side == 0 else y.ndim - len(w_out)
    y_dims = (*range(n), *range(first, first + len(w_out)))
    x_dims, window, w_window = (*x_group, *x_in), (), ()
    groups = math.prod(w.shape[d] for d in w_group)
    inner = math.prod(w.shape[d] for d in w_in)
    channels, kind = groups * inner, "dense"
    out = math.prod(y.shape[d] for d in y_dims)
    macs = y.size * inner
  else:
    d = p["dimension_numbers"]
    w_out, w_in, w_window = (d.rhs_spec[0],), (d.rhs_spec[1],), tuple(d.rhs_spec[2:])
    w_group, x_dims, y_dims = (), (d.lhs_spec[1],), (d.out_spec[1],)
    window = tuple(w.shape[i] for i in w_window)
    groups, channels = p["feature_group_count"], x.shape[d.lhs_spec[1]]
    out = w.shape[d.rhs_spec[0]]
    kind = "depthwise" if groups == channels and groups > 1 else "conv"
    macs = y.size * math.prod(window) * (channels // groups)
  return Layer(
    name=name,
    param=param,
    kind=kind,
    in_channels=channels,
    out_channels=out,
    groups=groups,
    window=window,
    macs=max(1, macs // batch),
    x_dims=tuple(x_dims),
    y_dims=tuple(y_dims),
    x_ndim=x.ndim,
    y_ndim=y.ndim,
    x_rows=0 if 0 in x_dims or x.shape[0] % batch else x.shape[0] // batch,
    w_shape=tuple(w.shape),
    w_group_dims=tuple(w_group),
    w_in_dims=tuple(w_in),
    w_window_dims=w_window,
    w_out_dims=tuple(w_out),
  )


def _path(keys) -> str:
  """`blocks/3/mlp/fc1/kernel` from a key path; the wrapper level of a Flax variable is dropped."""
  path = jax.tree_util.keystr(keys, simple=True, separator="/")
  for suffix in ("/value", "/raw_value", ".value", ".raw_value"):
    path = path.removesuffix(suffix)
  return path.replace(".", "/")


def _names(paths: Sequence[str]) -> dict[str, str]:
  """Layer names: the module's path where it is unique, else the parameter's whole path.

  Linen's collection name `params/` is left out when every layer has it.
  """
  modules = {path: path.rpartition("/")[0] for path in paths}
  count = collections.Counter(modules.values())
  names = {path: m if m and count[m] == 1 else path for path, m in modules.items()}
  if all(name.startswith("params/") for name in names.values()):
    names = {path: name.removeprefix("params/") for path, name in names.items()}
  return names
