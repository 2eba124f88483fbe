"""HAWQ-v3's bit allocation (arXiv 2011.10680; ICML 2021; code: Zhen-Dong/HAWQ, ILP.ipynb).

A layer's loss of accuracy is modelled by the curvature of the loss and the error of the weights,

    Omega[i, b] = mean trace_i * |W_i - Q_b(W_i)|^2,   mean trace_i = tr(H_ii) / (size of W_i),

and an integer linear program chooses bits of least sum Omega under limits of size, BitOPs and
latency. Layers that meet in a residual addition without an operation in between (the convolution of
the main branch that downsamples, and that of the shortcut) are tied. The weights alone are looked
at; activations stay in floating point.

| symbol | meaning |
|---|---|
| I | layers to choose for |
| B | bit widths |
| H_ii | Hessian of the loss by the weights of layer i |
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Layer
from flexiq_jax.methods.examples import blocks, cross_entropy
from flexiq_jax.methods.layerwise import Stacks, picked
from flexiq_jax.methods.program import Choices
from flexiq_jax.methods.programmed import Programmed, ProgramSettings

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class HawqSettings(ProgramSettings):
  """What HAWQ-v3 is told.

  Attributes:
    probes: random vectors of the trace.
  """

  probes: int = 32

  def __post_init__(self):
    super().__post_init__()
    check_probes(self.probes)


class Hawq(Programmed):
  """Traces of the Hessian times errors of the weights."""

  name = "hawq"
  Settings = HawqSettings

  @functools.cached_property
  def choices(self) -> Choices:
    """The options; layers whose results meet in an addition are tied."""
    return dataclasses.replace(self.start.choices, tied=self.tied())

  def measured(self) -> np.ndarray:
    """`omega`, and nothing where layers are in floating point."""
    start, network, names = self.start, self.start.network, self.start.choices.names
    value = self.measure(4.0 * self.settings.probes * start.share, self._traces)
    errors = squared_errors(network.layers, network.weights, start.stacks, names)
    return start.with_float(omega(value, errors))

  def _traces(self) -> np.ndarray:
    """Kept in a file of the run: they are of the float model, so of all tasks."""
    start, network = self.start, self.start.network
    path = start.workdir.path / "hawq.npz"
    if not path.is_file():
      found = mean_traces(
        *(jax.random.key(start.seed), network.apply, network.params, network.layers),
        *(start.examples.x, start.examples.labels),
        names=start.choices.names,
        probes=self.settings.probes,
        block=self.settings.block,
      )
      np.savez(path, names=start.choices.names, trace=found.value, error=found.error)
    return np.load(path)["trace"]

  def tied(self) -> tuple[tuple[str, ...], ...]:
    """Layers whose results meet in an addition with nothing but a norm between."""
    found, tied = self.start.operations, []
    for operation in found:
      if operation.kind == "add":
        ends = [found[p] for p in operation.inputs]
        ends = [found[o.inputs[0]] if o.kind == "norm" else o for o in ends]
        if len(names := [o.layer for o in ends if o.layer in self.start.names]) == 2:
          tied.append(tuple(names))
    return tuple(tied)


@dataclasses.dataclass(frozen=True)
class MeanTraces:
  """Traces of the Hessian's blocks by layer, divided by the number of weights.

  Attributes:
    value: float64 `[I]`.
    error: float64 `[I]`, their standard errors.
  """

  value: np.ndarray
  error: np.ndarray


def mean_traces(
  key: Array,
  apply: graph.Apply,
  params: Any,
  layers: Sequence[Layer],
  x: Array,
  labels: Array,
  *,
  names: Sequence[str] | None = None,
  probes: int = 8,
  block: int = 64,
) -> MeanTraces:
  """Traces of the cross-entropy's Hessian, by Hutchinson's estimator (`trace_sample`).

  Each block of examples has random vectors of its own, which is worth more than all examples for
  each vector. The standard error is that of the estimator; it knows nothing of other examples.

  Args:
    key: typed random key.
    apply: the float model, batch norm folded.
    params: its parameters.
    layers: its layers.
    x: `[n, ...]` examples of the training set.
    labels: int `[n]`.
    names: which layers; None: all.
    probes: random vectors for each block; all of them cost about four forward passes over the
      examples each.
    block: examples in one pass.

  Raises:
    ValueError: fewer than two probes, arrays that do not fit, or an unknown layer.
  """
  check_probes(probes)
  chosen = picked(layers, names)

  def loss(weights, params, x, y, share):
    logits = graph.with_rule(apply, _with_weights(weights))(params, x)
    return (cross_entropy(logits, y) * share).sum()

  @jax.jit
  def sample(key, weights, params, x, y, share):
    sums = trace_sample(key, lambda w: loss(w, params, x, y, share), weights)
    return jnp.stack([sums[layer.name] for layer in chosen])

  all_weights = graph.weights(apply, params, jax.ShapeDtypeStruct((1, *x.shape[1:]), "float32"))
  weights = {layer.name: all_weights[layer.name] for layer in chosen}
  value, variance = np.zeros(len(chosen)), np.zeros(len(chosen))
  for number, (_, own, y, used) in enumerate(blocks(x, labels, block)):
    share = used.astype(np.float32) / np.float32(len(x))
    keys = jax.random.split(jax.random.fold_in(key, number), probes)
    samples = [np.asarray(sample(k, weights, params, own, y, share), np.float64) for k in keys]
    value += np.mean(samples, axis=0)
    variance += np.var(samples, axis=0, ddof=1) / probes
  size = np.array([layer.params for layer in chosen], np.float64)
  return MeanTraces(value / size, np.sqrt(variance) / size)


def trace_sample(key: Array, loss: Callable[[Any], Array], params: Any) -> Any:
  """One sample of Hutchinson's estimator: like `params`, a float32 scalar for each.

  With a random sign v for each number, E[v_i' (H v)_i] = tr(H_ii) for every parameter i at once.
  Products H v are derivatives of the gradient along v, forward over reverse: each costs about four
  evaluations of the loss.
  """
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  signs = [jax.random.rademacher(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
  v = jax.tree.unflatten(structure, signs)
  product = jax.jvp(jax.grad(loss), (params,), (v,))[1]
  return jax.tree.map(lambda a, b: jnp.vdot(a, b).astype(jnp.float32), v, product)


def check_probes(probes: int) -> None:
  """Refuses fewer than two, which show no error."""
  if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
    raise ValueError(f"probes: {probes!r}; at least 2 are accepted")


def omega(mean_trace: np.ndarray, squared_error: np.ndarray) -> np.ndarray:
  """Sensitivities, float64 `[n]`, an objective for `program.Problem`.

  Args:
    mean_trace: float `[I]`, trace of the Hessian by the layer's weights, per weight.
    squared_error: float `[I, B]`, |W - Q_b(W)|^2 summed over the layer, for each bit width.

  Raises:
    ValueError: shapes that do not fit, errors that are negative or not finite.
  """
  mean_trace, squared = np.asarray(mean_trace, np.float64), np.asarray(squared_error, np.float64)
  if mean_trace.ndim != 1 or squared.shape[:-1] != mean_trace.shape:
    raise ValueError(
      f"squared_error: shape {squared.shape} for {mean_trace.shape} traces; expected [I, B]"
    )
  for field, values in (("mean_trace", mean_trace), ("squared_error", squared)):
    if not np.isfinite(values).all():
      raise ValueError(f"{field}: {int((~np.isfinite(values)).sum())} numbers are not finite")
  if (squared < 0).any():
    raise ValueError(f"squared_error: {squared.min()}; expected no negative ones")
  return (mean_trace[:, None] * squared).ravel()


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
  chosen = picked(layers, names)
  out = np.empty((len(chosen), len(stacks.bits)))
  for i, layer in enumerate(chosen):
    w, stack = np.asarray(weights[layer.name], np.float64), stacks.stack(layer.name)
    for k in range(len(stacks.bits)):
      out[i, k] = np.square(w - np.asarray(stack.dequantized(layer, k), np.float64)).sum()
  return out


def _with_weights(weights: Mapping[str, Array]):
  """The rule that takes some layers' weights from elsewhere."""
  return lambda layer, x, w, contract: contract(x, weights.get(layer.name, w))
