"""HAWQ-v3's bit allocation (arXiv 2011.10680; ICML 2021; code: Zhen-Dong/HAWQ, ILP.ipynb).

A layer's loss of accuracy is modelled by the curvature of the loss and the error of the weights,

    Omega[i, b] = mean trace_i * |W_i - Q_b(W_i)|^2,   mean trace_i = tr(H_ii) / (size of W_i),

and an integer linear program chooses bits of least sum Omega under limits of size, BitOPs and
latency. Layers that meet in a residual addition without an operation in between (the convolution of
the main branch that downsamples, and that of the shortcut) are tied.

| symbol | meaning |
|---|---|
| I | layers |
| H_ii | Hessian of the loss by the weights of layer i |
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.methods.program import Choices, Problem

Array = Any


@struct.dataclass
class Trace:
  """Estimated traces.

  Attributes:
    value: like the parameters, a float32 scalar for each: the trace of its block of the Hessian.
    error: the same of standard errors.
  """

  value: Any
  error: Any


def hutchinson(
  key: Array, loss: Callable[[Any], Array], params: Any, probes: int, *, batch: int = 8
) -> Trace:
  """Traces of the Hessian's diagonal blocks, one for each parameter (Hutchinson's estimator).

  Args:
    key: typed random key.
    loss: parameters -> scalar; differentiable twice.
    params: pytree of floating-point arrays.
    probes: number of random vectors; the standard error falls with its square root.
    batch: how many of them are computed at once; memory grows with it, the estimate does not.

  Raises:
    ValueError: fewer than two probes, which show no error; parameters that are no floats.
  """
  check_probes(probes)
  leaves, structure = jax.tree.flatten(params)
  for leaf in leaves:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(f"params: an array of {jnp.result_type(leaf)}; expected floating point only")

  def sample(key: Array) -> list[Array]:
    return jax.tree.leaves(trace_sample(key, loss, params))

  samples = jax.lax.map(sample, jax.random.split(key, probes), batch_size=min(batch, probes))
  return Trace(
    value=jax.tree.unflatten(structure, [s.mean() for s in samples]),
    error=jax.tree.unflatten(structure, [s.std(ddof=1) / probes**0.5 for s in samples]),
  )


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
  if probes < 2:
    raise ValueError(f"probes: {probes}; expected at least 2")


def omega(mean_trace: np.ndarray, squared_error: np.ndarray) -> np.ndarray:
  """Sensitivities, float64 `[n]`, an objective for `Problem`.

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


def size_megabytes(parameters: Sequence[int], bits: Sequence[int]) -> np.ndarray:
  """Size of the weights, float64 `[I, B]`, in MB of 2^20 bytes."""
  return np.multiply.outer(np.asarray(parameters, np.float64), bits) / 8 / 2**20


def bit_operations(macs: Sequence[float], bits: Sequence[int]) -> np.ndarray:
  """Bit operations in units of a 32 by 32 bit MAC, float64 `[I, B]`: MACs * (b / 32)^2.

  Weights and activations have b bits both. The unit is HAWQ's: an 8-bit MAC counts 1 / 16.
  """
  return np.multiply.outer(np.asarray(macs, np.float64), np.square(bits) / 1024.0)


def problem(
  choices: Choices, mean_trace: np.ndarray, squared_error: np.ndarray, shares: Mapping[str, float]
) -> Problem:
  """HAWQ-v3's program.

  Args:
    choices: the layers and their costs; the same number of bit widths for each.
    mean_trace: see `omega`.
    squared_error: see `omega`, in the order of `choices.bits`.
    shares: name of a cost -> where its limit is between all layers at their lowest bits (0) and all
      at their highest (1); the paper takes 0.25, 0.5 and 0.75.
  """
  limits = {cost: choices.between(cost, share) for cost, share in shares.items()}
  return Problem(choices=choices, objective=omega(mean_trace, squared_error), limits=limits)
