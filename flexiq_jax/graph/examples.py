"""Follows the batch dimension through a jaxpr: which dimension of a variable holds the examples.

A dimension *holds the examples* when it is the batch, each example's entries next to each other in
it (a Swin transformer folds an example's windows into the batch: four entries per example). Values
chosen per example at run time need to know it; taking a dimension for the batch that is none would
let one example change another's result. So this only follows operations that it knows, and calls
everything else unknown.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from flexiq_jax.graph.origins import aval

# States of a variable besides the number of a dimension (0, 1, ...).
FREE = -1  # does not depend on the examples
UNKNOWN = -2  # depends on them, in a way not followed

# Primitives by name, since not all of them are public in every JAX release.
_ELEMENTWISE = {
  *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
  *("cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq"),
  *("erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
  *(
    "is_finite",
    "le",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
  ),
  *("nextafter", "not", "optimization_barrier", "or", "pow", "real", "reduce_precision", "rem"),
  *("round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
  *("sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
}
_REDUCTIONS = {
  *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
  *("argmax", "argmin"),
}
_SCANS = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}


def example_dims(jaxpr: Jaxpr, inputs: Sequence[int], batch: int) -> dict[Any, int]:
  """States of all variables of a jaxpr.

  Args:
    jaxpr: the jaxpr.
    inputs: state of each of its inputs.
    batch: number of examples.

  Returns:
    variable -> number of the dimension that holds the examples, or FREE, or UNKNOWN.
  """
  known: dict[Any, int] = dict.fromkeys(jaxpr.constvars, FREE)
  known.update(zip(jaxpr.invars, inputs, strict=True))
  for eqn in jaxpr.eqns:
    states = [FREE if isinstance(v, Literal) else known[v] for v in eqn.invars]
    known.update(zip(eqn.outvars, _outputs(eqn, states, batch), strict=True))
  return known


def _outputs(eqn: JaxprEqn, states: list[int], batch: int) -> Sequence[int]:
  tracked = {s for s in states if s != FREE}
  unknown = [UNKNOWN] * len(eqn.outvars)
  if not tracked:
    return [FREE] * len(eqn.outvars)
  if UNKNOWN in tracked:
    return unknown
  for key in ("jaxpr", "call_jaxpr"):  # jit, remat, custom derivative rules
    inner = eqn.params.get(key)
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    if isinstance(inner, Jaxpr) and eqn.primitive.name not in ("scan", "while", "pallas_call"):
      if len(inner.invars) != len(states):
        return unknown
      known = example_dims(inner, states, batch)
      return [FREE if isinstance(v, Literal) else known[v] for v in inner.outvars]
  if len(tracked) > 1 and eqn.primitive.name not in ("dot_general", "gather"):
    return unknown
  dim = _moved(eqn, states, max(tracked), batch)
  return unknown if dim is None else [dim] * len(eqn.outvars)


def _moved(eqn: JaxprEqn, states: list[int], d: int, batch: int) -> int | None:
  """Where dimension `d` of the tracked operands lies in the result; None if not known."""
  name, p = eqn.primitive.name, eqn.params
  shape = tuple(aval(eqn.invars[states.index(d)]).shape)
  out = tuple(aval(eqn.outvars[0]).shape)
  if name in _ELEMENTWISE:
    return d if out[d] == shape[d] else None  # other dimensions of size 1 may be repeated
  if name in _REDUCTIONS:
    return None if d in p["axes"] else d - sum(a < d for a in p["axes"])
  if name in _SCANS:
    return None if d == p["axis"] else d
  if name == "transpose":
    return tuple(p["permutation"]).index(d)
  if name == "broadcast_in_dim":
    new = p["broadcast_dimensions"][d]
    return new if out[new] == shape[d] else None
  if name == "reshape":
    return _reshaped(shape, out, d, batch) if p["dimensions"] is None else None
  if name == "squeeze":
    return None if d in p["dimensions"] else d - sum(a < d for a in p["dimensions"])
  if name in ("slice", "dynamic_slice", "pad"):
    # Of the same size and, where it could be shifted in place (pad), unpadded.
    padded = name == "pad" and tuple(p["padding_config"][d]) != (0, 0, 0)
    return d if states[0] == d and out[d] == shape[d] and not padded else None
  if name == "dynamic_update_slice":
    parts = [aval(v).shape[d] for v, s in zip(eqn.invars[:2], states[:2], strict=True) if s == d]
    return d if set(parts) == {out[d]} else None
  if name in ("concatenate", "sort"):
    return None if d == p["dimension"] else d
  if name == "stack":
    return d + (p["axis"] <= d)
  if name == "split":
    return None if d == p["axis"] else d
  if name == "rev":
    return None if d in p["dimensions"] else d
  if name.startswith("reduce_window") or name == "select_and_gather_add":
    window = (p["window_dimensions"][d], p["window_strides"][d], *p["padding"][d])
    return d if window == (1, 1, 0, 0) and out[d] == shape[d] else None
  if name == "conv_general_dilated":
    spec = p["dimension_numbers"]
    held = states[1] == FREE and d == spec.lhs_spec[0] and p["batch_group_count"] == 1
    return spec.out_spec[0] if held else None
  if name == "dot_general":
    return _contracted(eqn, states)
  if name == "gather":
    return _gathered(eqn, states)
  return None


def _reshaped(shape, out, d: int, batch: int) -> int | None:
  before = math.prod(shape[:d])
  for new, size in enumerate(out):
    # Examples stay the most significant part of the first dimension that starts where `d` did.
    if math.prod(out[:new]) == before and size % batch == 0:
      return new
  return None


def _contracted(eqn: JaxprEqn, states: list[int]) -> int | None:
  (contract, shared) = eqn.params["dimension_numbers"]
  places = []
  for side in (0, 1):
    d = states[side]
    if d == FREE:
      continue
    if d in shared[side]:
      places.append(shared[side].index(d))
      continue
    if d in contract[side]:
      return None
    free = [
      i
      for i in range(aval(eqn.invars[side]).ndim)
      if i not in contract[side] and i not in shared[side]
    ]
    first = len(shared[0])
    if side == 1:
      first += aval(eqn.invars[0]).ndim - len(contract[0]) - len(shared[0])
    places.append(first + free.index(d))
  return places[0] if len(set(places)) == 1 else None


def _gathered(eqn: JaxprEqn, states: list[int]) -> int | None:
  """Examples in what is looked up, in the indices (tokens in a table), or in both, paired."""
  p, numbers = eqn.params, eqn.params["dimension_numbers"]
  (d, at), before = states[:2], tuple(aval(eqn.invars[0]).shape)
  batched = tuple(numbers.operand_batching_dims)
  if at != FREE:
    paired = batched.index(d) if d in batched else None
    if d != FREE and (paired is None or numbers.start_indices_batching_dims[paired] != at):
      return None
    # Dimensions of the indices, but the last, which holds one index, stand in order in the result.
    rest = [i for i in range(aval(eqn.outvars[0]).ndim) if i not in numbers.offset_dims]
    return rest[at] if at < len(rest) else None
  gone = (*numbers.collapsed_slice_dims, *batched)
  if d in gone or p["slice_sizes"][d] != before[d]:
    return None
  kept = [i for i in range(len(before)) if i not in gone]
  return numbers.offset_dims[kept.index(d)]
