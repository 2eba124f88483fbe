"""Which variables of a jaxpr derive from which parameters, and where parameters are contracted.

A variable is *static* when it depends on parameters and constants alone; its origin is then the set
of parameter leaves it derives from. A variable that depends on the model's input is *dynamic*.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as prim

# Numbers of the parameter leaves that a static variable derives from; None marks a dynamic one.
Origin = frozenset[int] | None

# Contractions that no rule can take over.
_OTHER_CONTRACTIONS = ("ragged_dot", "ragged_dot_general", "scaled_matmul")


def origin(v: Any, known: Mapping[Any, Origin]) -> Origin:
  """Origin of an equation's operand."""
  return frozenset() if isinstance(v, Literal) else known[v]


def aval(v: Any) -> Any:
  """Shape and dtype of an operand."""
  return v.aval


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  """Computes the results of an equation."""
  out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
  return out if eqn.primitive.multiple_results else [out]


def needed(jaxpr: Jaxpr, reads: Mapping[int, Sequence[Any]]) -> set[Any]:
  """Variables that a jaxpr's results need.

  Args:
    jaxpr: flat.
    reads: equation number -> the operands that it does read, where those are not all.
  """
  found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  for i in reversed(range(len(jaxpr.eqns))):
    eqn = jaxpr.eqns[i]
    if not found.isdisjoint(eqn.outvars):
      found.update(v for v in reads.get(i, eqn.invars) if not isinstance(v, Literal))
  return found


def propagate(jaxpr: Jaxpr, inputs: Sequence[Origin]) -> dict[Any, Origin]:
  """Origin of every variable of a jaxpr, given those of its inputs."""
  known: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, frozenset())
  known.update(zip(jaxpr.invars, inputs, strict=True))
  for eqn in jaxpr.eqns:
    operands = [origin(v, known) for v in eqn.invars]
    out = None if None in operands else frozenset(i for o in operands if o for i in o)
    known.update(dict.fromkeys(eqn.outvars, out))
  return known


def is_contraction(eqn: JaxprEqn) -> bool:
  """Whether an equation multiplies and sums two operands."""
  return eqn.primitive in (prim.dot_general_p, prim.conv_general_dilated_p) or (
    eqn.primitive.name in _OTHER_CONTRACTIONS
  )


def param_side(eqn: JaxprEqn, known: Mapping[Any, Origin]) -> int | None:
  """Which of the first two operands is a parameter contracted with a dynamic one, if any."""
  if not is_contraction(eqn):
    return None
  left, right = (origin(v, known) for v in eqn.invars[:2])
  if left and right is None:
    return 0
  return 1 if right and left is None else None


def contracted_params(eqn: JaxprEqn, inputs: Sequence[Origin]) -> frozenset[int]:
  """Parameters contracted with a dynamic operand anywhere inside an equation's jaxprs."""
  found: frozenset[int] = frozenset()
  for inner, given in _inner_jaxprs(eqn, list(inputs)):
    known = propagate(inner, given)
    for e in inner.eqns:
      side = param_side(e, known)
      if side is not None:
        found |= origin(e.invars[side], known) or frozenset()
      found |= contracted_params(e, [origin(v, known) for v in e.invars])
  return found


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
  """A jaxpr and the values of its constants."""
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def _inner_jaxprs(eqn: JaxprEqn, inputs: list[Origin]) -> Iterator[tuple[Jaxpr, list[Origin]]]:
  """The jaxprs in an equation's parameters with the origins of their inputs."""
  name, p = eqn.primitive.name, eqn.params
  if name == "while":
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    body, consts = p["body_jaxpr"].jaxpr, inputs[n_cond : n_cond + n_body]
    carry = _settle(body, consts, inputs[n_cond + n_body :], [])
    yield body, [*consts, *carry]
    yield p["cond_jaxpr"].jaxpr, [*inputs[:n_cond], *carry]
  elif name == "scan":
    body, n, m = p["jaxpr"].jaxpr, p["num_consts"], p["num_carry"]
    carry = _settle(body, inputs[:n], inputs[n : n + m], inputs[n + m :])
    yield body, [*inputs[:n], *carry, *inputs[n + m :]]
  else:
    given = inputs[1:] if name == "cond" else inputs
    for value in p.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, (Jaxpr, ClosedJaxpr)):
          inner = open_jaxpr(item)[0]
          if len(given) == len(inner.invars):
            yield inner, given


def _settle(body: Jaxpr, consts, carry, xs) -> list[Origin]:
  """Origins of a loop's carry once further rounds no longer change them."""
  carry = list(carry)
  while True:
    known = propagate(body, [*consts, *carry, *xs])
    outs = [origin(v, known) for v in body.outvars[: len(carry)]]
    merged = [None if a is None or b is None else a | b for a, b in zip(carry, outs, strict=True)]
    if merged == carry:
      return carry
    carry = merged
