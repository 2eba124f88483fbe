"""Recognises activation functions in a jaxpr by what they compute, not by who wrote them.

Every variable that depends on a starting one becomes a nested tuple: `("max", 0.0, "x")`. Calls are
replaced by what they call, numbers are rounded to float32, and operands of commutative operations
are sorted. The functions below are written in the same form, so a function is recognised wherever
the tuples agree.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from flexiq_jax.graph import aval
from flexiq_jax.kernels import Activation

Array = Any
Expression = Any

_SQRT_HALF = np.float32(np.sqrt(0.5))
# What the epilogue of a kernel can compute -> the ways in which models write it.
FORMS: dict[Activation, tuple[Callable[[Array], Array], ...]] = {
  "relu": (jax.nn.relu, lambda x: jnp.maximum(x, 0.0)),
  "relu6": (
    jax.nn.relu6,
    lambda x: jnp.clip(x, 0.0, 6.0),
    lambda x: jnp.maximum(jnp.minimum(x, 6.0), 0.0),
  ),
  "gelu": (
    functools.partial(jax.nn.gelu, approximate=False),
    lambda x: 0.5 * x * (1.0 + jax.lax.erf(x / np.float32(np.sqrt(2.0)))),
    lambda x: x * (0.5 * (1.0 + jax.lax.erf(x * _SQRT_HALF))),
  ),
  "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True),),
}
_COMMUTATIVE = ("add", "mul", "max", "min")
_ELEMENTWISE = (
  *("add", "sub", "mul", "div", "max", "min", "neg", "exp", "tanh", "erf", "erfc", "logistic"),
  *("integer_pow", "pow", "square", "sqrt", "rsqrt", "clamp"),
  *("copy", "convert_element_type", "broadcast_in_dim"),
)
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# No form above takes more equations.
_LONGEST = 16


def expression(eqn: JaxprEqn, operands: Sequence[Expression | None]) -> Expression | None:
  """What an equation computes, as a tuple of its operands; None for an operation not known here.

  Args:
    eqn: an equation of one result.
    operands: a tuple, a number or the name of a variable for each; None for an unknown one.
  """
  if len(eqn.outvars) != 1 or any(o is None for o in operands):
    return None
  for key in _CALLS:
    inner = eqn.params.get(key)
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    if isinstance(inner, Jaxpr) and not inner.constvars and len(inner.invars) == len(operands):
      return of_jaxpr(inner, operands)
  name = eqn.primitive.name
  if name not in _ELEMENTWISE:
    return None
  if name == "copy":
    return operands[0]
  if name in ("convert_element_type", "broadcast_in_dim"):
    before, after = aval(eqn.invars[0]), aval(eqn.outvars[0])
    same = name == "convert_element_type" and before.dtype == after.dtype
    return operands[0] if same or isinstance(operands[0], float) else None
  operands = sorted(operands, key=repr) if name in _COMMUTATIVE else operands
  if name == "square":
    return ("integer_pow", 2, *operands)
  return (name, *((eqn.params["y"],) if name == "integer_pow" else ()), *operands)


def of_jaxpr(jaxpr: Jaxpr, inputs: Sequence[Expression | None]) -> Expression | None:
  """The expression of a jaxpr's only result; None if an operation is not known here."""
  known: dict[Any, Expression | None] = dict(zip(jaxpr.invars, inputs, strict=True))
  for eqn in jaxpr.eqns:
    found = expression(eqn, [_operand(v, known) for v in eqn.invars])
    known.update(dict.fromkeys(eqn.outvars, found))
  return _operand(jaxpr.outvars[0], known) if len(jaxpr.outvars) == 1 else None


@functools.cache
def known_forms() -> Mapping[Expression, Activation]:
  """Expression of x -> name of the activation function."""
  x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  found = {}
  for name, forms in FORMS.items():
    for form in forms:
      traced = of_jaxpr(jax.make_jaxpr(form)(x).jaxpr, ["x"])
      assert traced is not None, f"{name}: not followed"
      found[traced] = name
  return found


def match(
  eqns: Sequence[JaxprEqn], uses: Mapping[Any, Sequence[int]], start: Any
) -> tuple[Activation, tuple[int, ...], Any] | None:
  """The activation function that a variable goes through, and nothing else.

  Args:
    eqns: a jaxpr's equations.
    uses: variable -> numbers of the equations that read it (the number of equations stands for the
      jaxpr's results).
    start: the variable.

  Returns:
    `(name, equation numbers, result variable)` of the longest match whose inner variables are read
    by these equations alone; None if there is none.
  """
  known: dict[Any, Expression] = {start: "x"}
  steps: list[int] = []
  best = None
  for number in range(min(uses[start], default=len(eqns)), len(eqns)):
    eqn = eqns[number]
    if known.keys().isdisjoint(v for v in eqn.invars if not isinstance(v, Literal)):
      continue
    found = expression(eqn, [_operand(v, known) for v in eqn.invars])
    if found is None or len(steps) == _LONGEST:
      break
    out = eqn.outvars[0]
    known[out] = found
    steps.append(number)
    closed = all(set(uses[v]) <= set(steps) for v in known if v is not out)
    if closed and found in known_forms():
      best = known_forms()[found], tuple(steps), out
  return best


def _operand(v: Any, known: Mapping[Any, Expression | None]) -> Expression | None:
  if not isinstance(v, Literal):
    return known.get(v)
  return float(f"{float(v.val):.6g}") if np.ndim(v.val) == 0 else None
