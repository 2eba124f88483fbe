r"""Batch norm as it is while training, on a network that it was folded into.

The graph folds inference batch norm into weights and biases, and the module's own training mode is
out of reach of a pure function. But a rule sees the result y of every layer, so it can normalise:

    y_n' = scale_n (y_n - mean_n) / sqrt(var_n + eps) + shift_n,

with the moments of the batch while training, whose derivative counts, and running averages of them
otherwise. With scale and shift the standard deviation and the mean that y had in the float model,
the network computes what it did. The bias that was folded stays after it, so this is batch norm
with another origin of its parameters. After layers without batch norm, whose moments stay, it is
an affine map.

| symbol | shape | meaning |
|---|---|---|
| y | as the layer's result | of the contraction alone |
| scale, shift | `[N]` | trained |
| mean, var | `[N]` | of each output channel over batch and positions |
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax import graph
from flexiq_jax.graph import Layer, Rule

Array = Any

EPSILON = 1e-5
MOMENTUM = 0.1  # what a batch counts in a running average


@struct.dataclass
class Affine:
  """What is trained of a layer's norm.

  Attributes:
    scale, shift: float32 `[N]`.
  """

  scale: Array
  shift: Array


@struct.dataclass
class Moments:
  """What a layer's norm has seen.

  Attributes:
    mean, var: float32 `[N]`.
  """

  mean: Array
  var: Array


def moments(layer: Layer, y: Array) -> Moments:
  """Mean and variance of each output channel of a layer's result."""
  rest = tuple(d for d in range(layer.y_ndim) if d not in layer.y_dims)
  y = y.astype(jnp.float32)
  return Moments(y.mean(axis=rest).reshape(-1), y.var(axis=rest).reshape(-1))


def normalized(layer: Layer, y: Array, affine: Affine, seen: Moments) -> Array:
  """A layer's result after its norm, float32."""
  factor = affine.scale / jnp.sqrt(seen.var + EPSILON)
  shift = affine.shift - seen.mean * factor
  return y * layer.y_vector(factor, y.shape) + layer.y_vector(shift, y.shape)


def rule_normed(
  rule: Rule,
  affine: Mapping[str, Affine],
  running: Mapping[str, Moments],
  live: Collection[str] = (),
  records: dict[str, Moments] | None = None,
) -> Rule:
  """A rule with norms after its layers.

  Args:
    rule: how layers are computed.
    affine: layer name -> its norm; layers without one stay as they are.
    running: layer name -> running moments.
    live: names of layers that are normalised by the moments of the batch.
    records: filled while tracing, if given: layer name -> running moments after this batch, of all
      layers with a norm.
  """

  def run(layer, x, w, contract):
    y, name = rule(layer, x, w, contract), layer.name
    if name not in affine:
      return y
    seen = after = running[name]
    if name in live:
      seen = moments(layer, y)
      mix = lambda old, new: old + MOMENTUM * (jax.lax.stop_gradient(new) - old)
      after = jax.tree.map(mix, after, seen)
    if records is not None:
      records[name] = after
    return normalized(layer, y, affine[name], seen)

  return run


def observe(
  apply: graph.Apply,
  params: Any,
  batches: Iterable[Array],
  rule: Rule,
  affine: Mapping[str, Affine] | None = None,
) -> dict[str, Moments]:
  """Moments of every layer's result over some batches.

  Args:
    apply: of the folded model.
    params: its parameters.
    batches: inputs `[B, ...]`, training data.
    rule: how layers are computed.
    affine: norms after layers, which go by the moments of each batch; None: there are none.

  Returns:
    layer name -> moments; with `affine`, of those layers alone.
  """

  @jax.jit
  def run(params, affine, x):
    found: dict[str, Moments] = {}

    def measure(layer, x, w, contract):
      y, name = rule(layer, x, w, contract), layer.name
      if affine is not None and name not in affine:
        return y
      found[name] = moments(layer, y)
      return y if affine is None else normalized(layer, y, affine[name], found[name])

    graph.with_rule(apply, measure)(params, x)
    return found

  count, sums = 0, {}
  for x in batches:
    size = len(jax.tree.leaves(x)[0])
    for name, seen in jax.device_get(run(params, affine, x)).items():
      mean = np.asarray(seen.mean, np.float64)
      square = np.asarray(seen.var, np.float64) + mean**2
      old = sums.get(name, (0.0, 0.0))
      sums[name] = (old[0] + size * mean, old[1] + size * square)
    count += size
  out = {}
  for name, (mean, square) in sums.items():
    mean = mean / count
    var = np.maximum(square / count - mean**2, 0)
    out[name] = Moments(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))
  return out


def affine_of(seen: Moments) -> Affine:
  """The norm that gives a layer's result the moments it had."""
  return Affine(jnp.sqrt(seen.var + EPSILON), seen.mean)


def unfolded_weights(start: Any, normed: Collection[str]) -> Any:
  """The folded parameters, with the weights of normalised layers as they were before folding.

  Their norms make up for it. Folding scales output channels differently, which no method whose
  source looks at a whole tensor of weights means.

  Args:
    start: what a method starts from.
    normed: names of the layers with batch norm.
  """
  network, x = start.network, jax.tree.map(lambda a: a[:1], start.x)
  weights = graph.weights(start.apply, start.params, x)
  paths = {layer.param: weights[layer.name] for layer in network.layers if layer.name in normed}

  def choose(keys, leaf):
    path = "/".join(str(key.key) for key in keys)
    return jnp.asarray(paths[path], jnp.float32) if path in paths else leaf

  return jax.tree_util.tree_map_with_path(choose, network.params)
