"""What HAWQ-v3 and MPQCO measure on a model: curvature, and what errors of weights do to logits.

    errors = curvature.squared_errors(layers, weights, stacks, names)
    traces = curvature.mean_traces(key, apply, params, layers, images, labels, names=names)
    hawq.omega(traces.value, errors)

Both make objectives of linear programs: one number for each layer and bit width. They look at the
weights alone; activations stay in floating point.

| symbol | meaning |
|---|---|
| I | layers to choose for |
| B | bit widths |
| z | logit of an image's label |
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Layer
from flexiq_jax.methods import hawq
from flexiq_jax.methods.layerwise import Stack, Stacks
from flexiq_jax.methods.suffixes import cross_entropy

Array = Any
Report = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class MeanTraces:
  """Traces of the Hessian's blocks by layer, divided by the number of weights.

  Attributes:
    value: float64 `[I]`.
    error: float64 `[I]`, their standard errors.
  """

  value: np.ndarray
  error: np.ndarray


def dequantized(layer: Layer, stack: Stack, k: Array) -> Array:
  """A layer's weights at width number `k`, float32 `w_shape`."""
  codes = layer.canonical(stack.w[k].astype(jnp.float32))
  return layer.native(codes * stack.w_scale[k].reshape(layer.groups, 1, 1, -1))


def squared_errors(
  layers: Sequence[Layer],
  weights: Mapping[str, Array],
  stacks: Stacks,
  names: Sequence[str] | None = None,
) -> np.ndarray:
  """|W - Q_b(W)|^2 summed over each layer, float64 `[I, B]`.

  Args:
    layers: of the model.
    weights: from `graph.weights`.
    stacks: all layers at every width.
    names: which layers; None: all.
  """
  picked = _pick(layers, names)
  out = np.empty((len(picked), len(stacks.bits)))
  for i, layer in enumerate(picked):
    w, stack = np.asarray(weights[layer.name], np.float64), stacks.stack(layer.name)
    for k in range(len(stacks.bits)):
      out[i, k] = np.square(w - np.asarray(dequantized(layer, stack, k), np.float64)).sum()
  return out


def mean_traces(
  key: Array,
  apply: graph.Apply,
  params: Any,
  layers: Sequence[Layer],
  images: Array,
  labels: Array,
  *,
  names: Sequence[str] | None = None,
  probes: int = 8,
  block: int = 64,
  report: Report | None = None,
) -> MeanTraces:
  """Traces of the cross-entropy's Hessian, by Hutchinson's estimator (`hawq.trace_sample`).

  Each block of images has random vectors of its own, which is worth more than all images for each
  vector. The standard error is that of the estimator; it knows nothing of other images.

  Args:
    key: typed random key.
    apply: the float model, batch norm folded.
    params: its parameters.
    layers: its layers.
    images: `[n, ...]` of the training set.
    labels: int `[n]`.
    names: which layers; None: all.
    probes: random vectors for each block; all of them cost about four forward passes over the
      images each.
    block: images in one pass.
    report: called with the share of the work that is done.

  Raises:
    ValueError: fewer than two probes, arrays that do not fit, or an unknown layer.
  """
  hawq.check_probes(probes)
  picked = _pick(layers, names)

  def loss(weights, params, x, y, share):
    logits = graph.with_rule(apply, _with_weights(weights))(params, x)
    return (cross_entropy(logits, y) * share).sum()

  @jax.jit
  def sample(key, weights, params, x, y, share):
    sums = hawq.trace_sample(key, lambda w: loss(w, params, x, y, share), weights)
    return jnp.stack([sums[layer.name] for layer in picked])

  all_weights = graph.weights(
    apply, params, jax.ShapeDtypeStruct((1, *images.shape[1:]), "float32")
  )
  weights = {layer.name: all_weights[layer.name] for layer in picked}
  value, variance = np.zeros(len(picked)), np.zeros(len(picked))
  for number, (done, x, y, used) in enumerate(_blocks(images, labels, block)):
    share = used.astype(np.float32) / np.float32(len(images))
    keys = jax.random.split(jax.random.fold_in(key, number), probes)
    samples = [np.asarray(sample(k, weights, params, x, y, share), np.float64) for k in keys]
    value += np.mean(samples, axis=0)
    variance += np.var(samples, axis=0, ddof=1) / probes
    if report:
      report(done)
  size = np.array([layer.params for layer in picked], np.float64)
  return MeanTraces(value / size, np.sqrt(variance) / size)


def relative_logits(
  apply: graph.Apply,
  params: Any,
  layers: Sequence[Layer],
  stacks: Stacks,
  images: Array,
  labels: Array,
  *,
  names: Sequence[str] | None = None,
  block: int = 64,
  report: Report | None = None,
) -> np.ndarray:
  """MPQCO's metric, mean of ((dz/dW . (Q_b(W) - W)) / z)^2 / 2 over images, float64 `[I * B]`.

  As CLADO's code computes it, with the logit of the label as z. Derivatives are taken forward along
  each error of weights, which gives all images of a block at once.

  Args:
    apply: the float model, batch norm folded.
    params: its parameters.
    layers: its layers.
    stacks: all of them, at every width.
    images: `[n, ...]` of the training set.
    labels: int `[n]`.
    names: which layers; None: all.
    block: images in one pass.
    report: called with the share of the work that is done.

  Returns:
    An objective for `Problem`, in the order of `Choices.create(names, stacks.bits, ...)`.

  Raises:
    ValueError: arrays that do not fit, an unknown layer, or a logit of zero.
  """
  picked = _pick(layers, names)

  @jax.jit
  def changes(stacks, params, i, k, x, y):
    def label_logit(t):
      def rule(layer, x, w, contract):
        if layer not in picked:
          return contract(x, w)
        error = dequantized(layer, stacks.stack(layer.name), k) - w
        return contract(x, w + jnp.where(picked.index(layer) == i, t, 0.0) * error)

      logits = graph.with_rule(apply, rule)(params, x)
      return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]

    z, dz = jax.jvp(label_logit, (jnp.float32(0),), (jnp.float32(1),))
    return jnp.square(dz / z) / 2

  widths = len(stacks.bits)
  total = np.zeros((len(picked), widths))
  for done, x, y, used in _blocks(images, labels, block):
    for i, k in np.ndindex(*total.shape):
      each = changes(stacks, params, np.int32(i), np.int32(k), x, y)
      total[i, k] += np.asarray(each, np.float64)[used].sum()
    if report:
      report(done)
  if not np.isfinite(total).all():
    raise ValueError("images: the logit of a label is 0 or not finite; its relative change is not")
  return total.ravel() / len(images)


def _with_weights(weights: Mapping[str, Array]):
  """The rule that takes some layers' weights from elsewhere."""
  return lambda layer, x, w, contract: contract(x, weights.get(layer.name, w))


def _pick(layers: Sequence[Layer], names: Sequence[str] | None) -> list[Layer]:
  known = {layer.name: layer for layer in layers}
  if unknown := [name for name in names or () if name not in known]:
    near = graph.closest(unknown[0], [*known])
    raise ValueError(f"names: no layer {unknown[0]!r}; closest names: {near}")
  return [known[name] for name in (known if names is None else names)]


def _blocks(images: Array, labels: Array, block: int) -> Iterator[tuple[float, Array, Array, Any]]:
  """(share done with it, images, labels, which of them count) of blocks of one size."""
  images, labels = np.asarray(images), np.asarray(labels)
  if not len(images) or labels.shape != images.shape[:1] or block < 1:
    raise ValueError(
      f"images, labels, block: {list(images.shape)}, {list(labels.shape)}, {block}; expected "
      "[n, ...], [n] and blocks of at least one image"
    )
  size = min(block, len(images))
  for start in range(0, len(images), size):
    rows = np.arange(start, start + size)
    used, rows = rows < len(images), rows % len(images)
    done = min(1.0, (start + size) / len(images))
    yield done, jnp.asarray(images[rows]), jnp.asarray(labels[rows], jnp.int32), used
