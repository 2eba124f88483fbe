"""Reorders a layer's input channels by reordering what the layers before it write.

    reorder(traced, "blocks/0/attn/proj", order).outputs  # {"blocks/0/attn/qkv": their order}

A channel order is free where all that lies between the layers keeps channels apart: elementwise
operations, a gate times what it lets through, the heads of an attention. It is followed from the
layer's input backwards, equation by equation; each says how its operands have to be ordered for its
result to be. Whatever cannot be told, or would be read in the wrong order by somebody else, is
refused.

A variable's order is a `Moves` (`graph.moves`): for some of its dimensions, where each entry comes
from. Behind `dot_general`, whose heads are a batch dimension, and `reshape [B, T, H, D] -> [B, T, H
D]`, the order of a projection's input is one of heads (and of the channels inside them, for the
values alone).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from flexiq_jax.graph.layer import Layer
from flexiq_jax.graph.moves import (
  Fixed,
  Moves,
  Order,
  agreed,
  placed,
  reshaped,
  restrict,
  row_major,
  widen,
)
from flexiq_jax.graph.origins import aval, open_jaxpr
from flexiq_jax.graph.tracing import Apply, Traced, trace

_ELEMENTWISE = frozenset(
  (
    *("abs", "add", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "div", "eq"),
    *("erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not"),
    *("or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt"),
    *("square", "stop_gradient", "sub", "tanh", "xor"),
  )
)
_REDUCTIONS = frozenset(
  ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")
)
_INNER = {
  "jit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "checkpoint": "jaxpr",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """What a layer's other order takes.

  Attributes:
    outputs: layer name -> int `[N]`, the output channel that is to stand at each place of its
      result. Biases that are added to it have one value per output channel and move along.
    params: path -> order of the entries of a parameter that is neither weight nor bias of a layer.
  """

  outputs: Mapping[str, np.ndarray]
  params: Mapping[str, Moves]


def reorder(traced: Traced, name: str, order: np.ndarray) -> Change:
  """What the layers before have to write for a layer to read its channels in another order.

  Args:
    traced: the model.
    name: the layer.
    order: int `[C]`, the channel that is to stand at each place; each channel once.

  Returns:
    What to write elsewhere; nothing where the order is the layer's own.

  Raises:
    Fixed: it cannot be done.
  """
  jaxpr = traced.jaxpr.jaxpr
  (start,) = (i for i, layer in traced.layers.items() if layer.name == name)
  layer = traced.layers[start]
  x = jaxpr.eqns[start].invars[1 - traced.sides[start]]
  sizes = [aval(x).shape[d] for d in layer.x_dims]
  source = np.stack(np.unravel_index(np.asarray(order).reshape(sizes), sizes))
  dims = np.argsort(layer.x_dims)
  source = source[dims].transpose(0, *(1 + dims))
  wanted = Moves(tuple(sorted(layer.x_dims)), source)
  if wanted.trivial:
    return Change(outputs={}, params={})
  found: dict[str, np.ndarray] = {}
  results = {jaxpr.eqns[i].outvars[0]: producer for i, producer in traced.layers.items()}

  def known(i: int, eqn: JaxprEqn, moves: Order) -> Mapping[int, Order] | None:
    """Operands of layers and of the additions of their biases."""
    if i == start:
      return {1 - traced.sides[i]: wanted}
    if moves is None:
      return None
    if i in traced.layers:
      producer = traced.layers[i]
      found[producer.name] = _outputs(producer, moves, aval(eqn.outvars[0]).shape)
      return {}
    for k, v in enumerate(eqn.invars):
      if not isinstance(v, Literal) and v in results and bias(eqn, v, results[v], traced):
        return {k: moves}
    return None

  left = {v: moves for v, moves in _pull(jaxpr, {}, known).items() if moves is not None}
  leaves = dict(zip(jaxpr.invars, traced.paths, strict=False))
  if others := left.keys() - leaves.keys():
    what = "a constant" if others <= traced.static else "the model's input"
    raise Fixed(f"{what} would have to move along")
  return Change(outputs=found, params={leaves[v]: moves for v, moves in left.items()})


def run_lengths(apply: Apply, params: Any, x: Any) -> dict[str, int]:
  """Layer name -> `run_length`; arguments as for `graph.layers`."""
  traced = trace(apply, params, x)
  return {layer.name: run_length(traced, layer.name) for layer in traced.layers.values()}


def run_length(traced: Traced, name: str) -> int:
  """The shortest runs of a layer's input channels that can stand in any order.

  1 where all channels are free, the channels of a head after an attention, 0 where the order is
  fixed.

  Args:
    traced: the model.
    name: the layer.
  """
  (layer,) = (layer for layer in traced.layers.values() if layer.name == name)
  c = layer.in_channels
  for size in (size for size in range(1, c // 2 + 1) if c % size == 0):
    exchanged, turned = np.arange(c).reshape(-1, size), np.roll(np.arange(c), size)
    exchanged[[0, 1]] = exchanged[[1, 0]]
    try:
      # All orders of the runs are made of these two.
      for order in (exchanged, turned):
        reorder(traced, name, order)
    except Fixed:
      continue
    return size
  return 0


def bias(eqn: JaxprEqn, y: Any, layer: Layer, traced: Traced) -> Any:
  """What an equation adds to a layer's result `y`, one static value per output channel, or None."""
  if eqn.primitive.name != "add" or aval(eqn.outvars[0]) != aval(y):
    return None
  other = eqn.invars[1] if eqn.invars[0] is y else eqn.invars[0]
  if isinstance(other, Literal) or other not in traced.static:
    return None
  shape, full = aval(other).shape, aval(y).shape
  wanted = tuple(n if d in layer.y_dims else 1 for d, n in enumerate(full))
  return other if shape == wanted else None


def _outputs(layer: Layer, moves: Moves, shape: Sequence[int]) -> np.ndarray:
  """The order of a layer's outputs `[N]`, those that nobody minds filled in."""
  sizes = [shape[d] for d in layer.y_dims]
  if not set(moves.dims) <= set(layer.y_dims):
    raise Fixed(f"other dimensions of the result of {layer.name} would have to move")
  flat = row_major(widen(moves, layer.y_dims, shape).source, sizes).reshape(-1)
  free = flat < 0
  flat[free] = np.flatnonzero(free)
  if not np.array_equal(np.sort(flat), np.arange(len(flat))):
    raise Fixed(f"the result of {layer.name} is wanted in several orders")
  return flat


def _pull(
  jaxpr: Jaxpr,
  outs: Mapping[Any, Order],
  known: Callable[[int, JaxprEqn, Order], Mapping[int, Order] | None] = lambda *_: None,
) -> dict[Any, Order]:
  """Follows orders backwards through a jaxpr.

  Args:
    jaxpr: flat, or the inside of a call.
    outs: result -> its order; None for those that it does not name.
    known: called with the number of each equation, the equation, and the order of its first result;
      operand number -> order where it knows better, None where it does not.

  Returns:
    Order of every variable that no equation here makes.
  """
  asked: dict[Any, list[Order]] = {}
  for v in jaxpr.outvars:
    if not isinstance(v, Literal):
      asked.setdefault(v, []).append(outs.get(v))
  for i in reversed(range(len(jaxpr.eqns))):
    eqn = jaxpr.eqns[i]
    orders = [agreed(asked.pop(v, [])) for v in eqn.outvars]
    operands = known(i, eqn, orders[0])
    if operands is None:
      moved = any(order is not None for order in orders)
      operands = _operands(eqn, orders) if moved or eqn.primitive.name in _PARTS else {}
    for k, v in enumerate(eqn.invars):
      if not isinstance(v, Literal):
        asked.setdefault(v, []).append(operands.get(k))
  return {v: agreed(orders) for v, orders in asked.items()}


def _operands(eqn: JaxprEqn, orders: Sequence[Order]) -> dict[int, Order]:
  """Operand number -> its order, for an equation's results to have theirs."""
  name, first, shape = eqn.primitive.name, orders[0], aval(eqn.outvars[0]).shape
  if name in _PARTS:
    return {0: _PARTS[name](eqn, orders)}
  if name in _INNER:
    inner = open_jaxpr(eqn.params[_INNER[name]])[0]
    left = _pull(inner, dict(zip(inner.outvars, orders, strict=True)))
    if any(moves is not None and v not in inner.invars for v, moves in left.items()):
      raise Fixed(f"a constant inside `{name}` would have to move along")
    return {k: left.get(v) for k, v in enumerate(inner.invars)}
  if first is None or len(orders) > 1:
    raise Fixed(f"`{name}` has several results")
  if name in _ELEMENTWISE:
    return {
      k: restrict(first, {d: d for d in first.dims if aval(v).shape[d] == shape[d]})
      for k, v in enumerate(eqn.invars)
      if aval(v).ndim
    }
  if name == "squeeze" or (name == "reshape" and eqn.params["dimensions"] is None):
    return {0: reshaped(first, aval(eqn.invars[0]).shape, shape)}
  if name == "transpose":
    return {0: restrict(first, {d: eqn.params["permutation"][d] for d in first.dims})}
  if name == "broadcast_in_dim":
    before = aval(eqn.invars[0]).shape
    to = {o: d for d, o in enumerate(eqn.params["broadcast_dimensions"])}
    keep = {o: d for o, d in to.items() if o in first.dims and before[d] == shape[o]}
    return {0: restrict(first, keep)}
  if name in _REDUCTIONS:
    left = [d for d in range(aval(eqn.invars[0]).ndim) if d not in eqn.params["axes"]]
    return {0: restrict(first, {d: left[d] for d in first.dims})}
  if name == "gather":
    return {0: restrict(first, _windows(eqn, first.dims))}
  if name == "dot_general":
    return {k: restrict(first, _factor(eqn, k, first.dims)) for k in (0, 1)}
  raise Fixed(f"`{name}` mixes what would have to be told apart")


def _windows(eqn: JaxprEqn, dims: Sequence[int]) -> dict[int, int]:
  """Dimension of a gather's result -> the operand's, for those that it takes whole."""
  numbers, before = eqn.params["dimension_numbers"], aval(eqn.invars[0]).shape
  gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  windows = dict(
    zip(numbers.offset_dims, (d for d in range(len(before)) if d not in gone), strict=True)
  )
  for d in dims:
    if d not in windows or eqn.params["slice_sizes"][windows[d]] != before[windows[d]]:
      raise Fixed("`gather` takes channels by their numbers")
  return {d: windows[d] for d in dims}


def _factor(eqn: JaxprEqn, side: int, dims: Sequence[int]) -> dict[int, int]:
  """Dimension of a product -> dimension of one factor, of those in `dims` that it has."""
  contract, batch = eqn.params["dimension_numbers"]
  free = [
    [d for d in range(aval(eqn.invars[k]).ndim) if d not in (*contract[k], *batch[k])]
    for k in (0, 1)
  ]
  start = len(batch[0]) + (len(free[0]) if side else 0)
  places = [*enumerate(batch[side]), *enumerate(free[side], start)]
  return {o: d for o, d in places if o in dims}


def _slice(eqn: JaxprEqn, orders: Sequence[Order]) -> Moves:
  """The order of a slice's operand: nobody minds what is outside."""
  p, before = eqn.params, aval(eqn.invars[0]).shape
  steps = p["strides"] or (1,) * len(before)
  window = tuple(
    range(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], steps, strict=True)
  )
  return placed(before, [window], orders)


def _split(eqn: JaxprEqn, orders: Sequence[Order]) -> Moves:
  before, axis, start, windows = aval(eqn.invars[0]).shape, eqn.params["axis"], 0, []
  for size in eqn.params["sizes"]:
    window = [range(n) for n in before]
    window[axis] = range(start, start + size)
    windows.append(tuple(window))
    start += size
  return placed(before, windows, orders)


# Equations whose operand is ordered in part, whatever the order of the result.
_PARTS = {"slice": _slice, "split": _split}
