"""QuantuneV2's sensitivity lists and plans, in each form of the graph (arXiv 2501.07161).

The paper says: one inference in floating point and one with everything quantized, local metrics
(SQNR delta and MSE) at each node, precision by the resulting list, fusion of operations, and the
form of the graph chosen among several. The rest is our reading (ranking.py: the formulas;
fusion.py: the forms; runs.py: the runs):

- Nodes of layers that may be lowered are ranked; another node has the highest precision that it
  reads.
- A form's predicted error is the sum of NMSE_v over the nodes left low, plus what rounding each
  node's output costs at its precision, step^2 / 12 over mean a^2. To it comes a penalty for each
  edge between precisions. (The sum of the scores would not do: they have zero mean in every form.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexiq_jax.graph import closest
from flexiq_jax.methods import fusion
from flexiq_jax.methods.fusion import Grouping, Node
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.quantune import ranking
from flexiq_jax.methods.quantune.runs import Runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
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


def ranked(runs: Runs, grouping: Grouping, names: Sequence[str]) -> Ranked:
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
  delta = ranking.sqnr_delta(sqnr.tolist(), [node.inputs for node in nodes])
  own = [at[name] for name in names]
  scores = ranking.score(delta[own], nmse[own])
  return Ranked(
    grouping=grouping,
    nodes=nodes,
    sqnr=sqnr,
    delta=delta,
    nmse=nmse,
    ranking=ranking.rank(names, scores),
    score=dict(zip(names, scores.tolist(), strict=True)),
  )


def allocate(
  runs: Runs,
  listed: Ranked,
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
    extra: layer -> what high precision costs more than low; None counts layers.
    budget: the most that all of them may cost.
    kept: bits of layers that may not be lowered.
    penalty: of a boundary, in units of the predicted error (an NMSE).
    fill: see `ranking.allocate`.
  """
  low, high = pair
  if not 2 <= low < high <= FLOAT:
    raise ValueError(f"pair: {pair}; expected low < high, in 2..{FLOAT}")
  if not penalty >= 0:
    raise ValueError(f"penalty: {penalty}; expected at least 0")
  raised = set(ranking.allocate(listed.ranking, extra, budget, fill=fill))
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
  edges = ranking.boundaries([b > low for b in node_bits], inputs)
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
    allocate(runs, ranked(runs, grouping, names), pair, extra, budget, **options)
    for grouping in groupings
  ]
  fused = {plan.grouping: -fusion.GROUPINGS.index(plan.grouping) for plan in plans}
  return tuple(sorted(plans, key=lambda plan: (plan.value, fused[plan.grouping])))
