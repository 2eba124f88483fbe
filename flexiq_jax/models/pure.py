"""Models as pure functions of a plain nested dict of arrays, and back.

    module = create("resnet20")
    apply, params = functional(module)
    logits = apply(params, images)  # images [B, 32, 32, 3] -> float32 [B, 10]
    module = with_params(module, params)

Paths in `params` read as the layers' names do in torchvision and timm: `layer1/0/conv1/kernel`,
`blocks/3/mlp/fc1/kernel`. Batch norm statistics are ordinary leaves (`bn1/mean`, `bn1/var`). Every
key is a string, entries of lists included, so that the dict goes unchanged through JSON-like
formats and checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
Apply = Callable[[Params, jax.Array], jax.Array]


def functional(module: nnx.Module) -> tuple[Apply, Params]:
  """Splits a module into a pure function and its parameters.

  Args:
    module: any NNX module that maps a batch to a batch of logits; it is not changed.

  Returns:
    `apply(params, x)`: float32 logits, in evaluation mode whatever mode the module is in; can be
    jitted, differentiated and vmapped, and takes any batch size. And `params`: nested dict with
    string keys, the module's own arrays as leaves, batch norm statistics included. Of a module made
    under `nnx.eval_shape` the leaves are shapes, which is enough to load weights into.
  """
  graph, state = nnx.split(module)
  evaluated = nnx.merge(graph, state)  # A copy, so that the caller's module keeps its mode.
  evaluated.eval()
  graph, state = nnx.split(evaluated)
  # Shapes only: a reference to the arrays would keep random weights alive next to loaded ones.
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

  def apply(params: Params, x: jax.Array) -> jax.Array:
    results = nnx.merge(graph, _fill(shapes, params))(x)
    return jax.tree.map(_as_float32, results)

  return apply, _nest((path, variable.get_value()) for path, variable in _leaves(state))


def _as_float32(a: jax.Array) -> jax.Array:
  return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a


def with_params(module: nnx.Module, params: Params) -> nnx.Module:
  """Copies a module with other parameters.

  Args:
    module: gives structure and mode (training or evaluation); it is not changed.
    params: nested dict as `functional` returns it.

  Returns:
    A new module.

  Raises:
    ValueError: `params` has other paths or shapes than the module; the message lists them.
  """
  graph, state = nnx.split(module)
  wanted = {path: variable.get_value().shape for path, variable in _leaves(state)}
  given = {path: jnp.shape(value) for path, value in flatten(params).items()}
  problems = [f"{path} is missing" for path in wanted if path not in given]
  problems += [f"{path} is unknown" for path in given if path not in wanted]
  problems += [
    f"{path} has shape {list(given[path])}, not {list(wanted[path])}"
    for path in wanted
    if path in given and given[path] != wanted[path]
  ]
  if problems:
    raise ValueError(
      f"params do not fit this {type(module).__name__}: {len(problems)} differences: "
      + "; ".join(problems[:10])
    )
  return nnx.merge(graph, _fill(state, params))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """Turns nested dicts into one dict of paths, as {'conv1/kernel': array}; order is kept."""
  flat: dict[str, Any] = {}
  for key, value in params.items():
    if isinstance(value, Mapping):
      flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
    else:
      flat[key] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
  """Turns a dict of paths back into nested dicts."""
  return _nest(flat.items())


def _nest(items) -> Params:
  params: Params = {}
  for path, value in items:
    *parents, leaf = path.split("/")
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = value
  return params


def _leaves(state: nnx.State) -> Iterator[tuple[str, nnx.Variable]]:
  """The variables of a state with their paths, in the order of the state."""
  for path, variable in nnx.to_flat_state(state):
    yield "/".join(map(str, path)), variable


def _fill(state: nnx.State, params: Params) -> nnx.State:
  """The state with the arrays of `params` in place of its own."""
  flat = flatten(params)
  return nnx.from_flat_state(
    (path, variable.replace(flat["/".join(map(str, path))]))
    for path, variable in nnx.to_flat_state(state)
  )
