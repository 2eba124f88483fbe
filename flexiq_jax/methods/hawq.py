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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.methods.examples import Examples, cross_entropy
from flexiq_jax.methods.layerwise import Stacks
from flexiq_jax.methods.program import Choices
from flexiq_jax.methods.programmed import Programmed, ProgramSettings, check_positive
from flexiq_jax.network import Network

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
    start = self.start
    value = self.measure(4.0 * self.settings.probes * start.share, self._traces)
    errors = squared_errors(start.network, start.stacks, start.choices.names)
    return start.with_float(omega(value, errors))

  def _traces(self) -> np.ndarray:
    """Kept in a file of the run: they are of the float model, so of all tasks."""
    start = self.start
    path = start.workdir.path / "hawq.npz"
    if not path.is_file():
      found = mean_traces(
        *(jax.random.key(start.seed), start.network, start.examples, start.choices.names),
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
  network: Network,
  examples: Examples,
  names: Sequence[str],
  *,
  probes: int = 8,
  block: int = 64,
) -> MeanTraces:
  """Traces of the cross-entropy's Hessian, by Hutchinson's estimator (`trace_sample`).

  Each block of examples has random vectors of its own, which is worth more than all examples for
  each vector. The standard error is that of the estimator; it knows nothing of other examples.

  Args:
    key: typed random key.
    network: the float model.
    examples: of the training set.
    names: which layers.
    probes: random vectors for each block; all of them cost about four forward passes over the
      examples each.
    block: examples in one pass.

  Raises:
    ValueError: fewer than two probes, no example in a block, or an unknown layer.
  """
  check_probes(probes)
  check_positive("block", block)
  size = np.array([network.layer(name).params for name in names], np.float64)

  def loss(weights, params, x, y, share):
    rule = lambda layer, x, w, contract: contract(x, weights.get(layer.name, w))
    logits = graph.with_rule(network.apply, rule)(params, x)
    return (cross_entropy(logits, y) * share).sum()

  @jax.jit
  def sample(key, weights, params, x, y, share):
    sums = trace_sample(key, lambda w: loss(w, params, x, y, share), weights)
    return jnp.stack([sums[name] for name in names])

  weights = {name: network.weights[name] for name in names}
  value, variance = np.zeros(len(names)), np.zeros(len(names))
  for number, (x, y, used) in enumerate(examples.blocks(block)):
    share = used.astype(np.float32) / np.float32(len(examples))
    keys = jax.random.split(jax.random.fold_in(key, number), probes)
    samples = [
      np.asarray(sample(k, weights, network.params, x, y, share), np.float64) for k in keys
    ]
    value += np.mean(samples, axis=0)
    variance += np.var(samples, axis=0, ddof=1) / probes
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


def squared_errors(network: Network, stacks: Stacks, names: Sequence[str]) -> np.ndarray:
  """|W - Q_b(W)|^2 summed over each of some layers, float64 `[I, B]`."""
  out = np.empty((len(names), len(stacks.bits)))
  for i, name in enumerate(names):
    w, stack = np.asarray(network.weights[name], np.float64), stacks.stack(name)
    for k in range(len(stacks.bits)):
      rounded = stack.dequantized(network.layer(name), k)
      out[i, k] = np.square(w - np.asarray(rounded, np.float64)).sum()
  return out
