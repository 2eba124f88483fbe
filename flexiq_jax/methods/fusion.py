"""Operations of a model and the ways to join them into nodes (QuantuneV2, arXiv 2501.07161).

The paper quantizes units of fused operations and picks the form of the graph that suits best; its
list of forms is not public. Ours, each with one quantized output per node:

| grouping | a node is |
|---|---|
| unfused | one operation |
| norm | a layer with the batch norm, or bias, after it |
| activation | the same with the activation after that |
| residual | the same with a residual addition after that, and the activation after the addition |

Operations are found in the traced model (graph.trace), whichever library wrote it: layers; `norm`,
arithmetic with parameters after an operation; `activation`, elementwise functions of one operation
alone; `add`, of two activations. Whatever else there is (pooling, reshapes, attention) belongs to
no operation: what reads it reads the operations that it reads. An operation joins the one before it
only if nobody else reads that one.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jax.extend.core import JaxprEqn
from jax.extend.core import Literal as Constant

from flexiq_jax.graph import Traced, aval

Grouping = Literal["unfused", "norm", "activation", "residual"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
Kind = Literal["layer", "norm", "activation", "add"]

_LINEAR = ("add", "sub", "mul", "div")
_SAME = ("convert_element_type", "copy", "stop_gradient")
_NONLINEAR = (
  *("max", "min", "clamp", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf"),
  *("erfc", "erf_inv", "abs", "sign", "neg", "square", "integer_pow", "pow", "sqrt", "rsqrt"),
  *("select_n", "gt", "ge", "lt", "le", "eq", "ne", "custom_jvp_call", "custom_vjp_call"),
)
# Those that are functions that a model names, as ReLU, and not a step of one.
_WHOLE = ("max", "clamp", "tanh", "logistic", "custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """One operation of a model.

  Attributes:
    kind: what it is.
    layer: name of the layer; None for other kinds.
    out: number of the equation that computes its output.
    inputs: numbers of the operations that it reads.
    extends: number of the one that it may be fused with: it reads that one directly, last of all,
      and nobody else does. None for a layer.
  """

  kind: Kind
  layer: str | None
  out: int
  inputs: tuple[int, ...]
  extends: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
  """Operations that are computed as one.

  Attributes:
    name: of its layer; of a node without one, that of the node it reads and its kind.
    layer: name of its layer, if there is one.
    operations: their numbers, in order; the last one's output is the node's.
    inputs: numbers of the nodes that it reads, without repetition.
  """

  name: str
  layer: str | None
  operations: tuple[int, ...]
  inputs: tuple[int, ...]


def operations(traced: Traced) -> tuple[Operation, ...]:
  """The operations of a model (`graph.tracing.trace`), in execution order."""
  return _Finder(traced).find()


def nodes(found: Sequence[Operation], grouping: Grouping) -> tuple[Node, ...]:
  """Joins operations into nodes.

  Args:
    found: from `operations`.
    grouping: how.

  Raises:
    ValueError: an unknown grouping.
  """
  if grouping not in GROUPINGS:
    raise ValueError(f"grouping: {grouping!r} is not one of {', '.join(GROUPINGS)}")
  level = GROUPINGS.index(grouping)
  members: list[list[int]] = []
  owner: dict[int, int] = {}
  for i, operation in enumerate(found):
    source = operation.extends
    if source is not None and _joins(found, members[owner[source]], source, operation.kind, level):
      owner[i] = owner[source]
      members[owner[i]].append(i)
    else:
      owner[i] = len(members)
      members.append([i])
  joined: list[Node] = []
  for number, own in enumerate(members):
    reads = dict.fromkeys(owner[p] for i in own for p in found[i].inputs)
    inputs = tuple(p for p in reads if p != number)
    layer = found[own[0]].layer
    name = layer or f"{joined[max(inputs)].name}+{found[own[0]].kind}"
    joined.append(Node(name=name, layer=layer, operations=tuple(own), inputs=inputs))
  return tuple(joined)


def _joins(found, members: Sequence[int], source: int, kind: Kind, level: int) -> bool:
  """Whether an operation of some kind becomes part of the node that ends with `source`."""
  kinds = [found[i].kind for i in members]
  if kinds[0] != "layer" or source != members[-1]:
    return False
  if kind == "norm":
    return level >= 1 and kinds[-1] == "layer"
  if kind == "activation":
    return level >= (3 if "add" in kinds else 2) and kinds[-1] != "activation"
  return kind == "add" and level >= 3 and "add" not in kinds


class _Finder:
  """Walks over the equations once."""

  def __init__(self, traced: Traced):
    self._traced = traced
    self._eqns = traced.jaxpr.jaxpr.eqns
    self._uses: dict[Any, list[int]] = collections.defaultdict(list)
    for i, eqn in enumerate(self._eqns):
      for v in {v for v in eqn.invars if not isinstance(v, Constant)}:
        self._uses[v].append(i)
    results = [v for v in traced.jaxpr.jaxpr.outvars if not isinstance(v, Constant)]
    for v in results:  # the caller reads them, too
      self._uses[v].append(len(self._eqns))
    self._found: list[Operation] = []
    self._made: dict[Any, int] = {}  # variable -> operation whose output it is
    self._reads: dict[Any, tuple[int, ...]] = {}  # variable -> operations that it depends on

  def find(self) -> tuple[Operation, ...]:
    taken: set[int] = set()
    for i, eqn in enumerate(self._eqns):
      if i in taken or all(v in self._traced.static for v in eqn.outvars):
        continue
      sources = dict.fromkeys(p for v in self._dynamic(eqn) for p in self._reads.get(v, ()))
      if i in self._traced.layers:
        self._add("layer", [i], tuple(sources))
        continue
      kind, chain = self._chain(i, eqn)
      if kind:
        taken.update(chain)
        self._add(kind, chain, tuple(sources))
      else:
        self._reads.update(dict.fromkeys(eqn.outvars, tuple(sources)))
    return tuple(self._found)

  def _add(self, kind: Kind, chain: list[int], inputs: tuple[int, ...]) -> None:
    first, out = self._eqns[chain[0]], self._eqns[chain[-1]].outvars[0]
    direct = {self._made[v]: v for v in self._dynamic(first) if v in self._made}
    extends = max(direct) if direct and kind != "layer" else None
    if extends is not None and not set(chain).issuperset(self._uses[direct[extends]]):
      extends = None
    layer = self._traced.layers[chain[0]].name if kind == "layer" else None
    self._made[out], self._reads[out] = len(self._found), (len(self._found),)
    self._found.append(
      Operation(kind=kind, layer=layer, out=chain[-1], inputs=inputs, extends=extends)
    )

  def _chain(self, i: int, eqn: JaxprEqn) -> tuple[Kind | None, list[int]]:
    """The kind of the operation that begins with an equation, and its equations."""
    dynamic = self._dynamic(eqn)
    if len(dynamic) == 2:
      same = len({aval(v).shape for v in dynamic}) == 1
      return ("add", [i]) if eqn.primitive.name == "add" and same else (None, [])
    if len(dynamic) != 1 or dynamic[0] not in self._made:
      return None, []
    if chain := self._norm(dynamic[0]):
      return "norm", chain
    if chain := self._activation(dynamic[0]):
      return "activation", chain
    # Others read the same: what is an activation by itself is still found.
    whole = eqn.primitive.name in _WHOLE and aval(eqn.outvars[0]).shape == aval(dynamic[0]).shape
    return ("activation", self._longer([i])) if whole else (None, [])

  def _norm(self, v: Any) -> list[int]:
    """Arithmetic with static operands: each step is all that reads the one before."""
    chain, pending = [], []
    while len(self._uses[v]) == 1 and self._uses[v][0] < len(self._eqns):
      i = self._uses[v][0]
      eqn = self._eqns[i]
      same_shape = aval(eqn.outvars[0]).shape == aval(v).shape
      if eqn.primitive.name not in (*_LINEAR, *_SAME) or self._dynamic(eqn) != [v]:
        break
      if not same_shape:
        break
      pending.append(i)
      if eqn.primitive.name in _LINEAR:  # a trailing cast belongs to what follows
        chain, pending = chain + pending, []
      v = eqn.outvars[0]
    return chain

  def _activation(self, v: Any) -> list[int]:
    """The shortest elementwise function of `v` alone, from its first use on; maybe none.

    The equations all depend on v and on nothing else dynamic; all but the last are read only by
    others of them, and so is v.
    """
    inside, chain, nonlinear = {v}, [], False
    waiting = set(self._uses[v])
    while waiting:
      i = min(waiting)
      if i == len(self._eqns):
        return []
      eqn = self._eqns[i]
      name, out = eqn.primitive.name, eqn.outvars[0]
      elementwise = name in (*_LINEAR, *_SAME, *_NONLINEAR) and len(eqn.outvars) == 1
      if (
        not elementwise
        or aval(out).shape != aval(v).shape
        or not inside.issuperset(self._dynamic(eqn))
      ):
        return []
      chain.append(i)
      inside.add(out)
      nonlinear |= name in _NONLINEAR or len(self._dynamic(eqn)) == 2
      waiting.discard(i)
      if not waiting and nonlinear:
        return self._longer(chain)
      waiting.update(self._uses[out])
    return []

  def _longer(self, chain: list[int]) -> list[int]:
    """Takes further nonlinear steps in line: ReLU6 is a maximum and a minimum."""
    while True:
      uses = self._uses[self._eqns[chain[-1]].outvars[0]]
      if len(uses) != 1 or uses[0] == len(self._eqns):
        return chain
      eqn = self._eqns[uses[0]]
      one = len(self._dynamic(eqn)) == 1 and len(eqn.outvars) == 1
      if not one or eqn.primitive.name not in ("max", "min", "clamp", *_SAME):
        return chain
      chain = [*chain, uses[0]]

  def _dynamic(self, eqn: JaxprEqn) -> list[Any]:
    """An equation's operands that depend on the model's input, each once."""
    static = self._traced.static
    return list(
      dict.fromkeys(v for v in eqn.invars if not isinstance(v, Constant) and v not in static)
    )
