"""From an equation of a jaxpr to the static facts of a layer, and names for people to read."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as prim

from flexiq_jax.graph.layer import Array, Layer
from flexiq_jax.graph.origins import aval


def why_not(eqn: JaxprEqn, side: int) -> str | None:
  """Why a contraction whose operand `side` is a parameter cannot be a layer; None if it can."""
  if eqn.primitive is prim.conv_general_dilated_p:
    if side == 0:
      return "the parameter is the convolution's input, not its kernel"
    if eqn.params["batch_group_count"] != 1:
      return "batch_group_count is not 1"
  elif eqn.primitive is not prim.dot_general_p:
    return f"`{eqn.primitive.name}` is not supported"
  elif not eqn.params["dimension_numbers"][0][0]:
    return "an outer product: no dimension is summed over"
  dtype = aval(eqn.invars[1 - side]).dtype
  if not jnp.issubdtype(dtype, jnp.floating):
    return f"its activation is {dtype}, not floating point"
  return None


def describe(eqn: JaxprEqn, side: int, name: str, param: str, batch: int, examples: int) -> Layer:
  """Static facts of a layer.

  Args:
    eqn: a dot_general or convolution.
    side: which operand (0 or 1) is the parameter.
    name: the layer's name.
    param: path of the parameter.
    batch: number of examples.
    examples: dimension of the other operand that holds them (see `graph.examples`).
  """
  w, x, y = aval(eqn.invars[side]), aval(eqn.invars[1 - side]), aval(eqn.outvars[0])
  p = eqn.params
  if eqn.primitive is prim.dot_general_p:
    contract, shared = ((d[side], d[1 - side]) for d in p["dimension_numbers"])
    (w_in, x_in), (w_group, x_group) = contract, shared
    w_out = tuple(d for d in range(w.ndim) if d not in (*w_in, *w_group))
    n = len(w_group)
    first = n if side == 0 else y.ndim - len(w_out)
    y_dims = (*range(n), *range(first, first + len(w_out)))
    x_dims, window, w_window, x_window = (*x_group, *x_in), (), (), ()
    groups = math.prod(w.shape[d] for d in w_group)
    inner = math.prod(w.shape[d] for d in w_in)
    channels, kind = groups * inner, "dense"
    out = math.prod(y.shape[d] for d in y_dims)
    macs = y.size * inner
  else:
    d = p["dimension_numbers"]
    w_out, w_in, w_window = (d.rhs_spec[0],), (d.rhs_spec[1],), tuple(d.rhs_spec[2:])
    w_group, x_dims, y_dims = (), (d.lhs_spec[1],), (d.out_spec[1],)
    x_window = tuple(d.lhs_spec[2:])
    window = tuple(w.shape[i] for i in w_window)
    groups, channels = p["feature_group_count"], x.shape[d.lhs_spec[1]]
    out = w.shape[d.rhs_spec[0]]
    kind = "depthwise" if groups == channels and groups > 1 else "conv"
    macs = y.size * math.prod(window) * (channels // groups)
  if batch == 1:
    rows = x.shape[0]
  else:
    apart = examples == 0 and 0 not in (*x_dims, *x_window)
    rows = x.shape[0] // batch if apart else 0
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
    x_window_dims=x_window,
    x_ndim=x.ndim,
    y_ndim=y.ndim,
    x_rows=rows,
    w_shape=tuple(w.shape),
    w_group_dims=tuple(w_group),
    w_in_dims=tuple(w_in),
    w_window_dims=w_window,
    w_out_dims=tuple(w_out),
  )


@dataclasses.dataclass(frozen=True)
class Contract:
  """The contraction of an equation, called as `contract(x, w, preferred_element_type=None)`.

  Attributes:
    eqn: a dot_general or convolution.
    side: which operand of it (0 or 1) is the parameter.
  """

  eqn: JaxprEqn
  side: int

  @property
  def convolution(self) -> Mapping[str, Any] | None:
    """Parameters of `conv_general_dilated`; None for a dot_general."""
    return None if self.eqn.primitive is prim.dot_general_p else self.eqn.params

  def __call__(self, x: Array, w: Array, preferred_element_type: Any = None) -> Array:
    """The contraction; real values may come with integer weights, unsigned codes with signed."""
    p = self.eqn.params
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if preferred_element_type is None and floating:
      preferred_element_type = p["preferred_element_type"]
    precision = p["precision"] if floating else None
    lhs, rhs = (w, x) if self.side == 0 else (x, w)
    if floating and w.dtype != x.dtype:  # real values with integer weights
      lhs, rhs = lhs.astype(x.dtype), rhs.astype(x.dtype)
    if self.convolution is None:
      return lax.dot_general(
        lhs,
        rhs,
        p["dimension_numbers"],
        precision=precision,
        preferred_element_type=preferred_element_type,
      )
    if not floating and lhs.dtype != rhs.dtype:  # uint8 with int8: XLA wants one type
      lhs, rhs = lhs.astype(jnp.int32), rhs.astype(jnp.int32)
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


def leaf_paths(keys: Sequence[Any]) -> tuple[str, ...]:
  """`blocks/3/mlp/fc1/kernel` for every leaf of a pytree.

  A Flax variable is a pytree node of its own with one child, `.value`; that level is dropped. A
  dictionary entry or an attribute beside others that is called `value` keeps its name.

  Args:
    keys: key path of each leaf.

  Raises:
    ValueError: two leaves would have the same path.
  """
  children = collections.Counter(path[:-1] for path in keys)
  paths = []
  for path in keys:
    attribute = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    if attribute and path[-1].name in ("value", "raw_value") and children[path[:-1]] == 1:
      path = path[:-1]
    paths.append(jax.tree_util.keystr(path, simple=True, separator="/").replace(".", "/"))
  if twice := [path for path, n in collections.Counter(paths).items() if n > 1]:
    raise ValueError(f"params: several leaves have the path {twice[0]!r}; rename one of them")
  return tuple(paths)


def layer_names(paths: Sequence[str]) -> dict[str, str]:
  """Layer names: the module's path where it is unique, else the parameter's whole path.

  Linen's collection name `params/` is left out when every layer has it.
  """
  linen = all(path.startswith("params/") for path in paths)
  short = {path: path.removeprefix("params/") if linen else path for path in paths}
  modules = {path: name.rpartition("/")[0] for path, name in short.items()}
  count = collections.Counter(modules.values())
  return {path: m if m and count[m] == 1 else short[path] for path, m in modules.items()}
