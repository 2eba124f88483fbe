"""QuantuneV2's ranking of nodes by two runs of a model (arXiv 2501.07161).

The paper names its metrics, SQNR delta and MSE, and two inferences, one in floating point and one
with *all* nodes quantized; its formulas are not public. This is a reconstruction:

    SQNR_v  = 10 log10(sum a_v^2 / sum (a_v - q_v)^2)     in dB
    delta_v = min over inputs p of SQNR_p - SQNR_v        what v loses beyond what it received
    score_v = z(delta_v) + z(log NMSE_v)                  z: zero mean, unit variance over nodes

and the nodes with the highest scores get the high precision, as far as the budget reaches.

| symbol | meaning |
|---|---|
| V | nodes: operations after fusion, each with one output |
| a, q | output of a node in floating point, and in the run with all nodes quantized |
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

# dB at which an output counts as exact: float32's precision. It stands for infinity in differences.
EXACT = 20 * math.log10(2**24)


def sqnr_delta(
  ratios: Sequence[float], inputs: Sequence[Sequence[int]], source: float = EXACT
) -> np.ndarray:
  """What each node loses beyond what it received, float64 `[V]`, in dB.

  Args:
    ratios: SQNR of each node's output, `[V]`; cut to -EXACT..EXACT.
    inputs: for each node the numbers of those that it reads; none for one that reads the model's
      input.
    source: SQNR of the model's input.
  """
  if len(inputs) != len(ratios):
    raise ValueError(f"inputs: of {len(inputs)} nodes; expected {len(ratios)}")
  if np.isnan(ratios).any():
    raise ValueError("ratios: there are NaN")
  cut = np.clip(np.asarray(ratios, np.float64), -EXACT, EXACT)
  received = [min((cut[p] for p in nodes), default=source) for nodes in inputs]
  return np.array(received) - cut


def score(delta: np.ndarray, errors: np.ndarray) -> np.ndarray:
  """z(delta) + z(log errors), float64 `[V]`; the higher, the more a node gains by high precision.

  Args:
    delta: float `[V]`, of `sqnr_delta`.
    errors: float `[V]`, NMSE; cut to what -EXACT..EXACT dB are.
  """
  floor = 10 ** (-EXACT / 10)
  return _standard(delta) + _standard(np.log(np.clip(errors, floor, 1 / floor)))


def rank(names: Sequence[str], scores: np.ndarray) -> tuple[str, ...]:
  """Names, highest score first; equal ones by name, so that no order of nodes matters."""
  if len(set(names)) != len(scores) or len(names) != len(scores) or np.isnan(scores).any():
    raise ValueError(f"scores: {scores} for {names}; expected a number for each, names different")
  pairs = zip(names, scores, strict=True)
  return tuple(name for name, _ in sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def allocate(
  ranking: Sequence[str],
  extra: Mapping[str, float] | None,
  budget: float,
  *,
  fill: bool = False,
) -> tuple[str, ...]:
  """The nodes that get the high precision: the longest beginning of the ranking in the budget.

  Args:
    ranking: names, of `rank`.
    extra: name -> what high precision costs more than low (bytes, predicted latency), not negative;
      None counts nodes.
    budget: the most that all of them may cost.
    fill: go on after a node that does not fit, with later ones that do. That uses more of the
      budget; without it a larger budget only adds nodes.
  """
  costs = np.array([1.0 if extra is None else extra[name] for name in ranking])
  if not (np.isfinite(costs).all() and (costs >= 0).all()):
    raise ValueError(f"extra: {extra}; expected finite costs >= 0")
  if not budget >= 0:
    raise ValueError(f"budget: {budget}; expected at least 0")
  if not fill:
    return tuple(ranking[: int(np.searchsorted(np.cumsum(costs), budget, side="right"))])
  taken, spent = [], 0.0
  for name, cost in zip(ranking, costs, strict=True):
    if spent + cost <= budget:
      taken.append(name)
      spent += cost
  return tuple(taken)


def boundaries(high: Sequence[bool], inputs: Sequence[Sequence[int]]) -> int:
  """Edges between nodes of different precision: each is a requantization at run time.

  Args:
    high: for each node whether it has the high precision, `[V]`.
    inputs: see `sqnr_delta`.
  """
  return sum(high[p] != high[v] for v, nodes in enumerate(inputs) for p in nodes)


def _standard(values: np.ndarray) -> np.ndarray:
  """Zero mean and unit variance; zeros for values that are all equal.

  Sums are exact, so that the order of nodes cannot change a bit.
  """
  values = np.asarray(values, np.float64)
  centered = values - math.fsum(values) / len(values)
  spread = math.sqrt(math.fsum(centered**2) / len(values))
  return centered / spread if spread > 1e-12 * np.abs(values).max() else np.zeros(len(values))
