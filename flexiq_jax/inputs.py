"""What users give: a model in any dialect, examples as an array or in batches, labels beside."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from flexiq_jax import models
from flexiq_jax.graph import Apply

Array = Any
CHUNK = 128  # examples in a batch, where a user gives one array

_NETS = "an NNX module, a Linen module or a function (params, x) is accepted"


def as_function(net: Any, params: Any = None) -> tuple[Apply, Any]:
  """A model as `(apply, params)`.

  Args:
    net: an NNX module, a Linen module, or any pure function `(params, x) -> y`.
    params: its parameters. Of an NNX module, None takes its own; a state, or a nested dict as
      `models.functional` makes it, takes their place. Of a Linen module, its variables, or their
      collection `params` alone.

  Raises:
    ValueError: the model is something else, cannot be called so, or lacks its parameters.
  """
  if isinstance(net, nnx.Module):
    if isinstance(params, nnx.State):
      net = nnx.clone(net)
      nnx.update(net, params)
    elif params is not None:
      net = models.with_params(net, params)
    return models.functional(net)
  if not callable(net) or isinstance(net, type):
    swapped = "; are net and params swapped?" if callable(params) else ""
    raise ValueError(f"net: {_what(net)}; {_NETS}{swapped}")
  if params is None:
    raise ValueError(f"params: missing; give the parameters of {_what(net)} after it")
  if callable(params) and jax.tree_util.all_leaves([params]):
    raise ValueError(f"params: {_what(params)}; the model's parameters are accepted, a pytree")
  if isinstance(net, nn.Module):
    variables = params if "params" in params else {"params": params}
    return lambda variables, x: net.apply(variables, x), variables
  try:
    inspect.signature(net).bind(params, None)
  except TypeError as error:
    raise ValueError(
      f"net: {_what(net)} cannot be called as net(params, x) ({error}); {_NETS}, as "
      "lambda params, x: ... for a module that holds its parameters itself"
    ) from None
  except ValueError:
    pass  # has no signature
  return net, params


def pairs(data: Any, name: str = "batches") -> Iterator[tuple[Array, Array | None]]:
  """Batches with their labels, None where there are none.

  Args:
    data: an array `[n, ...]`; `(array, labels)`, where labels are integers; or an iterable of
      either, read once.
    name: of the argument, for messages.

  Raises:
    ValueError: it is something else, it is empty, or its batches do not go together.
  """
  if data is None or isinstance(data, Mapping | str | bytes | nnx.State) or callable(data):
    raise ValueError(
      f"{name}: {_what(data)}; an array [n, ...] or an iterable of arrays is accepted"
    )
  whole = hasattr(data, "shape") or _labelled(data, isinstance(data, tuple))
  if not whole and not hasattr(data, "__iter__"):
    raise ValueError(
      f"{name}: {_what(data)}; an array [n, ...] or an iterable of arrays is accepted"
    )
  first = None
  for number, item in enumerate([data] if whole else data):
    x, y = item if _labelled(item, isinstance(item, tuple)) else (item, None)
    where = name if whole else f"{name}: number {number}"
    x = _array(x, where)
    labels = None if y is None else np.asarray(y)
    if first is not None and (x.shape[1:], x.dtype, y is None) != first:
      raise ValueError(
        f"{where} has {'no labels' if y is None else 'labels'}, {x.dtype} and examples of "
        f"{list(x.shape[1:])}; those before it have {'no labels' if first[2] else 'labels'}, "
        f"{first[1]} and {list(first[0])}"
      )
    first = x.shape[1:], x.dtype, y is None
    for start in range(0, len(x), CHUNK if whole else len(x)):
      part = slice(start, start + CHUNK if whole else None)
      yield x[part], None if labels is None else labels[part]
  if first is None:
    raise ValueError(f"{name}: nothing in it; a generator that was read before gives nothing more")


def batches_of(data: Any, name: str = "batches") -> list[Array]:
  """The batches `[B, ...]` of `pairs`, without labels."""
  return [x for x, _ in pairs(data, name)]


def _labelled(item: Any, as_tuple: bool) -> bool:
  """Whether something is examples and their labels, rather than two batches."""
  if not isinstance(item, tuple | list) or len(item) != 2:
    return False
  x, y = item
  if isinstance(y, list) and all(isinstance(label, int) for label in y):
    y = np.asarray(y)
  if not (hasattr(x, "shape") and hasattr(y, "shape")):
    return False
  if not np.issubdtype(y.dtype, np.integer) or x.shape[:1] != y.shape[:1]:
    return False
  return y.ndim < x.ndim or as_tuple or not np.issubdtype(x.dtype, np.integer)


def _array(x: Any, where: str) -> Array:
  if not isinstance(x, jax.Array):
    try:
      made = np.asarray(x)
    except ValueError:  # lists of unequal lengths
      made = np.array(None)
    if made.dtype.kind in "OSU":
      raise ValueError(f"{where}: {_what(x)}; arrays [B, ...] of numbers are accepted")
    x = made.astype(jax.dtypes.canonicalize_dtype(made.dtype), copy=False)
  if not x.shape or not len(x):
    raise ValueError(f"{where}: an array of shape {list(x.shape)}; [B, ...] is accepted")
  return x


def _what(value: Any) -> str:
  """A value in a few words."""
  if value is None:
    return "None"
  if hasattr(value, "shape"):
    return f"an array of shape {list(value.shape)}"
  if inspect.isroutine(value) or isinstance(value, type):
    return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
  name = type(value).__name__
  return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
