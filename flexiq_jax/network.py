"""`Network`: a float model, folded and traced, with one compiled function for each rule."""

import collections
import copy
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Layer, tracing
from flexiq_jax.quant import exact, rules

Array = Any


class Network:
  """A float model with batch norm folded, its layers, and one compiled function per rule.

  Attributes:
    apply, params: the folded model.
    layers: its layers, in execution order.
    skipped: contractions with parameters that are no layers.
    shared: layer name -> what has the same weights (see `graph.shared`).
    traces: rule -> how often it was traced, once for each batch shape.
    platform: cpu, gpu or tpu, for which its functions are compiled.
    example: shape and dtype of its input(s), for one example.
    fingerprint: of the float weights (see `fingerprint`).
    compiled: rule -> its jitted function: `float` and of `(params, x)`, `uniform` of `(model,
      params, x)`, `mixed` and `dynamic` of `(model, masks, params, x)`.
  """

  def __init__(self, apply: graph.Apply, params: Any, x: Any, platform: str | None = None):
    """Folds and traces a model.

    Args:
      apply: pure function `(params, x) -> logits` in inference mode.
      params: pytree of arrays, batch statistics included.
      x: example input `[B, ...]`, an array or a `jax.ShapeDtypeStruct`.
      platform: cpu, gpu or tpu: whose ways of computing exact products are taken (see `exact`).
        None is JAX's default backend.

    Raises:
      ValueError: see `graph.layers`; an unknown platform.
    """
    self.platform = exact.platform_of(platform)
    self.example = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    self.fingerprint = fingerprint(params)
    self.apply, self.params = graph.fold_batch_norm(apply, params, x)
    self.shared = graph.shared(apply, params, x)  # folded, each layer has a copy
    traced = tracing.trace(self.apply, self.params, x)
    self.layers, self.skipped = tuple(traced.layers.values()), traced.skipped
    self.traces: collections.Counter[str] = collections.Counter()
    self._x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)

  def __repr__(self) -> str:
    return f"Network({len(self.layers)} layers, {self.layers[0].name} to {self.layers[-1].name})"

  @functools.cached_property
  def weights(self) -> dict[str, Array]:
    """The weights of every layer, after batch norm is folded."""
    return graph.weights(self.apply, self.params, self._x)

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How many neighbouring input channels of each layer stay together (see `graph.reorder`)."""
    return graph.run_lengths(self.apply, self.params, self._x)

  def with_params(self, params: Any) -> "Network":
    """The same network with other values of its (folded) parameters; compiled functions are shared.

    Raises:
      ValueError: other names, shapes or dtypes than those of `self.params`.
    """
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    if describe(params) != describe(self.params):
      raise ValueError("params: other names, shapes or types than the network's parameters have")
    other = copy.copy(self)
    other.params = params
    other.__dict__["compiled"] = self.compiled
    other.__dict__.pop("weights", None)
    return other

  def layer(self, name: str) -> Layer:
    """A layer by its name.

    Raises:
      ValueError: there is no such layer.
    """
    for layer in self.layers:
      if layer.name == name:
        return layer
    near = graph.closest(name, [layer.name for layer in self.layers])
    raise ValueError(f"name: no layer {name!r}; closest names: {near}")

  def float(self, x: Array) -> Array:
    """Logits of the float model."""
    return self.compiled["float"](self.params, x)

  def uniform(self, model: rules.QModel, x: Array) -> Array:
    """Logits with every layer at the width it was quantized to."""
    return self.compiled["uniform"](model, self.params, x)

  def mixed(
    self, model: rules.QModel, masks: Mapping[str, Array], x: Array, dynamic: bool = False
  ) -> Array:
    """Logits with the masked channel groups in 4 bits (see `rules.mixed_rule`)."""
    return self.compiled["dynamic" if dynamic else "mixed"](model, masks, self.params, x)

  @functools.cached_property
  def compiled(self):
    def run_float(params, x):
      self.traces["float"] += 1
      return self.apply(params, x)

    def run_uniform(model, params, x):
      self.traces["uniform"] += 1
      return graph.with_rule(self.apply, rules.uniform_rule(model, self.platform))(params, x)

    def run_mixed(model, masks, params, x, dynamic):
      self.traces["dynamic" if dynamic else "mixed"] += 1
      rule = rules.mixed_rule(model, masks, dynamic, platform=self.platform)
      return graph.with_rule(self.apply, rule)(params, x)

    return {
      "float": jax.jit(run_float),
      "uniform": jax.jit(run_uniform),
      "mixed": jax.jit(functools.partial(run_mixed, dynamic=False)),
      "dynamic": jax.jit(functools.partial(run_mixed, dynamic=True)),
    }


def fingerprint(params: Any) -> str:
  """SHA-256 of a model's float weights; "" where there are only shapes.

  It is taken of the parameters as they were given, since folding batch norm rounds differently on
  other platforms: the SHA-256 of the digests of all floating-point leaves, in the tree's order.
  A leaf's digest is that of its shape as text, as `(3, 3)`, and of its values as little-endian
  float32. Counters and random keys do not count, nor does the precision that weights are held in.
  """
  whole = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
      return ""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      values = np.ascontiguousarray(np.asarray(leaf), "<f4")
      digest = hashlib.sha256(f"{np.shape(leaf)}".encode())
      digest.update(values.data)
      whole.update(digest.digest())
  return whole.hexdigest()
