"""QuantuneV2's two runs of a model, and what they show of each operation.

Both runs see the same examples, the first in floating point and the second with everything
quantized. What is recorded of every operation at once, the sums of a^2 and (a - q)^2 and the range
of a, is enough for all ways to fuse operations (fusion.py): choosing among these costs no further
run.

| symbol | meaning |
|---|---|
| O | operations (fusion.py) |
| a, q | output of an operation in floating point, and with everything quantized |
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.graph import Apply, Contract, Rule, tracing
from flexiq_jax.methods import fusion
from flexiq_jax.methods.fusion import Operation
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.quant.rules import float_rule

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
  """What the two runs showed, for each of O operations.

  Attributes:
    operations: the operations of the model.
    energy: float64 `[O]`, sum of a^2 of the outputs a in floating point.
    error: float64 `[O]`, sum of (a - q)^2; q is the output with everything quantized.
    span: float64 `[O]`, largest a (or 0) minus smallest a (or 0).
    count: int64 `[O]`, how many numbers were summed.
  """

  operations: tuple[Operation, ...]
  energy: np.ndarray
  error: np.ndarray
  span: np.ndarray
  count: np.ndarray

  def nmse(self, numbers: Sequence[int]) -> np.ndarray:
    """(a - q)^2 over a^2 of some operations, float64; inf where a is 0 and q is not."""
    error, energy = self.error[list(numbers)], self.energy[list(numbers)]
    empty = np.where(error > 0, np.inf, 0.0)
    return np.where(energy > 0, error / np.where(energy > 0, energy, 1), empty)

  def rounding(self, number: int, bits: int) -> float:
    """NMSE that rounding an operation's output to some bits would have."""
    if bits >= FLOAT or not self.energy[number]:
      return 0.0
    step = self.span[number] / (2**bits - 1)
    return float(step**2 / 12 * self.count[number] / self.energy[number])


def measure(apply: Apply, params: Any, rule: Rule, batches: Iterable[Array]) -> Runs:
  """Runs a model twice on the same examples: in floating point and by a rule.

  Args:
    apply: pure function `(params, x) -> y`, with its batch norm unfolded, so that fusing matters.
    params: its parameters.
    rule: how layers are computed in the second run: all in low precision.
    batches: examples `[B, ...]` each; iterated over once.

  Raises:
    ValueError: there are no batches, or an output is not finite.
  """
  found: tuple[Operation, ...] = ()

  @jax.jit
  def both(params, x):
    nonlocal found
    traced = tracing.trace(apply, params, x)
    found = fusion.operations(traced)
    a, q = (_outputs(traced, (params, x), found, r) for r in (float_rule, rule))
    rows = []
    for number in range(len(found)):
      one, other = a[number].astype(jnp.float32), q[number].astype(jnp.float32)
      low, high = jnp.minimum(one.min(), 0), jnp.maximum(one.max(), 0)
      rows.append(jnp.stack([jnp.square(one).sum(), jnp.square(one - other).sum(), low, high]))
    return jnp.stack(rows), jnp.array([v.size for v in a.values()])

  sums, spans, count = 0.0, [], 0
  for x in batches:
    rows, sizes = both(params, x)
    rows = np.asarray(rows, np.float64)
    sums, count = sums + rows[:, :2], count + np.asarray(sizes, np.int64)
    spans.append(rows[:, 2:])
  if not spans:
    raise ValueError("batches: there are none")
  sums = np.asarray(sums)
  if not np.isfinite(sums).all():
    number = int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0])
    raise ValueError(f"batches: the output of operation {number} is not finite")
  low, high = np.min(spans, axis=0)[:, 0], np.max(spans, axis=0)[:, 1]
  return Runs(
    operations=found,
    energy=sums[:, 0],
    error=sums[:, 1],
    span=high - low,
    count=np.asarray(count),
  )


def _outputs(
  traced: tracing.Traced, args: Any, found: Sequence[Operation], rule: Rule
) -> dict[int, Array]:
  """Runs a traced model; operation -> its output."""
  outputs: dict[int, Array] = {}
  numbers = {operation.out: number for number, operation in enumerate(found)}

  def at(i, eqn, operands):
    if i in traced.layers:
      layer, side = traced.layers[i], traced.sides[i]
      y = rule(layer, operands[1 - side], operands[side], Contract(eqn, side))
      y = y.astype(eqn.outvars[0].aval.dtype)
    else:
      y = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
      y = y[0] if eqn.primitive.multiple_results else y
    outputs[numbers[i]] = y
    return y

  tracing.evaluate(traced, jax.tree.leaves(args), dict.fromkeys(numbers, at))
  return {number: outputs[number] for number in range(len(found))}
