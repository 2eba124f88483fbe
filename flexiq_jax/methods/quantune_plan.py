"""QuantuneV2's sensitivity lists and plans, in each form of the graph (arXiv 2501.07161).

The paper says: one inference in floating point and one with everything quantized, local metrics
(SQNR delta and MSE) at each node, precision by the resulting list, fusion of operations, and the
form of the graph chosen among several. The rest is our reading (quantune.py: the formulas;
fusion.py: the forms; quantune_runs.py: the runs):

- Nodes of layers that may be lowered are ranked; another node has the highest precision that it
  reads.
- A form's predicted error is the sum of NMSE_v over the nodes left low, plus what rounding each
  node's output costs at its precision, step^2 / 12 over mean a^2. To it comes a penalty for each
  edge between precisions. (The sum of the scores would not do: they have zero mean in every form.)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax.graph import Layer, closest
from flexiq_jax.methods import fusion, quantune
from flexiq_jax.methods.fusion import Grouping, Node
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.quantune_runs import Runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
  """The sensitivity list of one form of the graph.

  Attributes:
    grouping: the form.
    nodes: its V nodes.
    sqnr: float64 `[V]`, dB.
    delta: float64 `[V]`, dB lost beyond what a node received.
    nmse: float64 `[V]`.
    ranking: layers that may be lowered, the most sensitive first.
    score: layer -> score.
  """

  grouping: Grouping
  nodes: tuple[Node, ...]
  sqnr: np.ndarray
  delta: np.ndarray
  nmse: np.ndarray
  ranking: tuple[str, ...]
  score: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
  """A plan in one form of the graph.

  Attributes:
    grouping: the form.
    bits: layer -> bits, of the layers that may be lowered.
    node_bits: int `[V]`, of all nodes.
    boundaries: edges between nodes of different precision.
    error: predicted error.
    value: error plus penalty for boundaries; the least is chosen.
  """

  grouping: Grouping
  bits: dict[str, int]
  node_bits: np.ndarray
  boundaries: int
  error: float
  value: float


def sensitivity(runs: Runs, grouping: Grouping, names: Sequence[str]) -> Sensitivity:
  """The sensitivity list of one form of the graph; one sort, no run.

  Args:
    runs: what the two runs showed.
    grouping: the form.
    names: layers that may be lowered.
  """
  nodes = fusion.nodes(runs.operations, grouping)
  at = {node.layer: v for v, node in enumerate(nodes) if node.layer}
  if unknown := [name for name in names if name not in at]:
    raise ValueError(f"names: no layer {unknown[0]!r}; closest names: {closest(unknown[0], [*at])}")
  nmse = runs.nmse([node.operations[-1] for node in nodes])
  with np.errstate(divide="ignore"):
    sqnr = -10 * np.log10(nmse)
  delta = quantune.sqnr_delta(sqnr.tolist(), [node.inputs for node in nodes])
  own = [at[name] for name in names]
  scores = quantune.score(delta[own], nmse[own])
  return Sensitivity(
    grouping=grouping,
    nodes=nodes,
    sqnr=sqnr,
    delta=delta,
    nmse=nmse,
    ranking=quantune.rank(names, scores),
    score=dict(zip(names, scores.tolist(), strict=True)),
  )


def allocate(
  runs: Runs,
  listed: Sensitivity,
  pair: tuple[int, int],
  extra: Mapping[str, float] | None,
  budget: float,
  *,
  kept: int = 8,
  penalty: float = 0.01,
  fill: bool = False,
) -> Allocation:
  """Gives the high precision to the head of a list, and predicts what the plan costs.

  Args:
    runs: what the two runs showed.
    listed: the list.
    pair: low and high bits; `FLOAT` as the high one leaves layers in floating point.
    extra: layer -> what high precision costs more than low; None counts layers. See `extra_cost`.
    budget: the most that all of them may cost.
    kept: bits of layers that may not be lowered.
    penalty: of a boundary, in units of the predicted error (an NMSE).
    fill: see `quantune.allocate`.
  """
  low, high = pair
  if not 2 <= low < high <= FLOAT:
    raise ValueError(f"pair: {pair}; expected low < high, in 2..{FLOAT}")
  if not penalty >= 0:
    raise ValueError(f"penalty: {penalty}; expected at least 0")
  raised = set(quantune.allocate(listed.ranking, extra, budget, fill=fill))
  bits = {name: high if name in raised else low for name in listed.ranking}
  node_bits: list[int] = []
  error = 0.0
  for v, node in enumerate(listed.nodes):
    if node.layer:
      own = bits.get(node.layer, kept)
    else:
      own = max((node_bits[p] for p in node.inputs), default=kept)
    node_bits.append(own)
    error += runs.rounding(node.operations[-1], own)
    if node.layer in bits and own == low:
      error += float(listed.nmse[v])
  inputs = [node.inputs for node in listed.nodes]
  edges = quantune.boundaries([b > low for b in node_bits], inputs)
  return Allocation(
    grouping=listed.grouping,
    bits=bits,
    node_bits=np.array(node_bits),
    boundaries=edges,
    error=error,
    value=error + penalty * edges,
  )


def choose(
  runs: Runs,
  names: Sequence[str],
  pair: tuple[int, int],
  extra: Mapping[str, float] | None,
  budget: float,
  *,
  groupings: Sequence[Grouping] = fusion.GROUPINGS,
  **options: Any,
) -> tuple[Allocation, ...]:
  """Plans in several forms of the graph, the best first; of equal ones the most fused.

  Args:
    runs: what the two runs showed.
    names: layers that may be lowered.
    pair: see `allocate`.
    extra: see `allocate`.
    budget: see `allocate`.
    groupings: the forms.
    **options: further arguments of `allocate`.
  """
  if not groupings:
    raise ValueError("groupings: empty; expected at least one")
  plans = [
    allocate(runs, sensitivity(runs, grouping, names), pair, extra, budget, **options)
    for grouping in groupings
  ]
  fused = {plan.grouping: -fusion.GROUPINGS.index(plan.grouping) for plan in plans}
  return tuple(sorted(plans, key=lambda plan: (plan.value, fused[plan.grouping])))


def extra_cost(
  layers: Sequence[Layer],
  pair: tuple[int, int],
  unit: str,
  *,
  macs_per_second: Mapping[int, float] | None = None,
  bytes_per_second: float = math.inf,
) -> dict[str, float]:
  """What high precision costs each layer more than low, for `allocate`.

  Args:
    layers: the layers.
    pair: low and high bits.
    unit: "bytes" of weights, "macs" times bits, "nodes", or "seconds" predicted for one example:
      the time of the products or that of reading the weights, whichever is longer.
    macs_per_second: bits -> speed of the device; read for seconds.
    bytes_per_second: at which it reads weights; read for seconds.

  Raises:
    ValueError: an unknown unit, or no speed for one of the bits.
  """

  def cost(layer: Layer, bits: int) -> float:
    stored = layer.params * bits / 8
    if unit == "seconds":
      if not macs_per_second or bits not in macs_per_second:
        raise ValueError(f"macs_per_second: {macs_per_second}; expected a speed for {bits} bits")
      return max(layer.macs / macs_per_second[bits], stored / bytes_per_second)
    return stored if unit == "bytes" else layer.macs * bits

  if unit not in ("bytes", "macs", "nodes", "seconds"):
    raise ValueError(f"unit: {unit!r} is not one of bytes, macs, nodes, seconds")
  if unit == "nodes":
    return {layer.name: 1.0 for layer in layers}
  # A device may be no faster at low precision; then high precision costs nothing there.
  return {layer.name: max(cost(layer, pair[1]) - cost(layer, pair[0]), 0.0) for layer in layers}
