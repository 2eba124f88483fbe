"""Inlines a model's calls and writes its scans out, so that every layer is an equation of its own.

A deep model may hold the parameters of all its blocks stacked, and scan over them. Step i reads
`stacked[i]`; written out, that is a slice with a number, as a Python loop over the blocks has it
(see `graph.parts` for what such a slice is called).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as prim

from flexiq_jax.graph.origins import (
  Origin,
  aval,
  bind,
  contracted_params,
  open_jaxpr,
  origin,
  propagate,
)

Array = Any

MOST_STEPS = 512  # a scan over time steps may be longer, and one layer per step is of no use there
# What a counter goes through before it is an index.
_COUNTING = frozenset(
  (
    *("add", "and", "clamp", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max"),
    *("min", "mul", "ne", "neg", "not", "or", "rem", "select_n", "sign", "sub"),
  )
)
# Calls that only wrap a jaxpr, and the parameter that holds it.
_TRANSPARENT = {prim.jit_p: "jaxpr", prim.closed_call_p: "call_jaxpr", prim.call_p: "call_jaxpr"}
# Calls with a derivative rule of their own: left whole unless a layer is inside.
_WRAPPED = {
  prim.custom_jvp_call_p: "call_jaxpr",
  prim.custom_vjp_call_p: "call_jaxpr",
  prim.remat_p: "jaxpr",
}


def inline(
  jaxpr: Jaxpr, consts, args, inputs: Sequence[Origin], paths: Sequence[str]
) -> list[Array]:
  """Evaluates a jaxpr with its calls inlined, so that tracing this gives the flat jaxpr.

  Args:
    jaxpr: of the model.
    consts: values of its constants.
    args: values of its inputs.
    inputs: the parameters that its inputs come from.
    paths: of the parameters, for messages.

  Raises:
    ValueError: a parameter is contracted where no rule can reach.
  """
  known = propagate(jaxpr, inputs)
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for eqn in jaxpr.eqns:
    operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
    origins = [origin(v, known) for v in eqn.invars]
    transparent = _TRANSPARENT.get(eqn.primitive)
    inside = frozenset() if transparent else contracted_params(eqn, origins)
    key = transparent or (_WRAPPED.get(eqn.primitive) if inside else None)
    if key:
      inner = open_jaxpr(eqn.params[key])
      outs = inline(inner[0], inner[1], operands, origins, paths)
    elif inside and not (why := _why_not(eqn, origins, inside)):
      outs = _unroll(eqn, operands, origins, paths)
    elif inside:
      name = eqn.primitive.name
      params = ", ".join(paths[i] for i in sorted(inside))
      raise ValueError(f"apply: parameter {params} is contracted inside `{name}`. {why}")
    else:
      outs = _compute(eqn, operands)
    env.update(zip(eqn.outvars, outs, strict=True))
  return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _why_not(eqn: JaxprEqn, origins: Sequence[Origin], inside: frozenset[int]) -> str:
  """Why an equation with contractions of the parameters `inside` is not written out; or nothing."""
  name, p = eqn.primitive.name, eqn.params
  if name == "while":
    return "How many steps it takes is not known before it runs; write a scan or a Python loop."
  if name == "cond":
    return "Its branches would share one channel order; compute both and choose by `jnp.where`."
  if name != "scan":
    return "It is computed as a whole, where no rule can reach; write it without."
  if p["length"] > MOST_STEPS:
    return f"It has more than {MOST_STEPS} steps, and each of them would be a layer of its own."
  stacked = origins[p["num_consts"] + p["num_carry"] :]
  if None in stacked and all(inside.isdisjoint(o) for o in stacked if o):
    return (
      "It runs over the input and not over stacked parameters, and its steps would share one scale "
      "and one channel order; over examples, write it with `jax.vmap`."
    )
  return ""


def _unroll(
  eqn: JaxprEqn, operands: Sequence[Array], origins: Sequence[Origin], paths: Sequence[str]
) -> list[Array]:
  """Results of a scan, its steps one after the other."""
  p = eqn.params
  n, m = p["num_consts"], p["num_carry"]
  (inner, closed), steps = open_jaxpr(p["jaxpr"]), range(p["length"])
  consts, carry, stacked = operands[:n], list(operands[n : n + m]), operands[n + m :]
  known, rows = list(origins[n : n + m]), [[] for _ in inner.outvars[m:]]
  for i in reversed(steps) if p["reverse"] else steps:
    given = [*origins[:n], *known, *origins[n + m :]]
    taken = [lax.index_in_dim(a, i, keepdims=False) for a in stacked]
    outs = inline(inner, closed, [*consts, *carry, *taken], given, paths)
    carry = outs[:m]
    found = propagate(inner, given)
    known = [origin(v, found) for v in inner.outvars[:m]]
    for row, out in zip(rows, outs[m:], strict=True):
      row.append(out)
  shapes = [aval(v) for v in eqn.outvars[m:]]
  if not steps:
    return [*carry, *(jnp.zeros(a.shape, a.dtype) for a in shapes)]
  return [*carry, *(jnp.stack(row[::-1] if p["reverse"] else row) for row in rows)]


def _compute(eqn: JaxprEqn, operands: Sequence[Array]) -> Sequence[Array]:
  """Computes an equation so that layers can be found in it.

  A `fori_loop` over stacked parameters slices them at its counter. The counter starts from a
  constant, hence all that is made of it is computed while the steps are written out, and slices
  have numbers. And what a product takes as integers, with real weights, is made real before it.
  """
  known = [not isinstance(o, jax.core.Tracer) for o in operands]
  name, out = eqn.primitive.name, aval(eqn.outvars[0])
  if name in _COUNTING and all(known) and out.shape == () and out.dtype in (jnp.bool_, jnp.int32):
    with jax.ensure_compile_time_eval():
      return bind(eqn, operands)
  if name == "dynamic_slice" and all(known[1:]):
    sizes = eqn.params["slice_sizes"]
    starts = [
      min(max(int(start), 0), whole - size)
      for start, whole, size in zip(operands[1:], operands[0].shape, sizes, strict=True)
    ]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    return [lax.slice(operands[0], starts, ends)]
  if eqn.primitive is prim.dot_general_p:
    kinds = [jnp.issubdtype(o.dtype, jnp.floating) for o in operands]
    if kinds[0] != kinds[1] and not any(jnp.iscomplexobj(o) for o in operands):
      real = operands[kinds.index(True)].dtype
      operands = [o if kind else o.astype(real) for o, kind in zip(operands, kinds, strict=True)]
  return bind(eqn, operands)
