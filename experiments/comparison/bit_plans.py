"""Plans of bits per layer by every layer-wise method of a comparison, for one seed.

A method measures once, at its first plan, and then plans for any budget. What measuring took goes
to the seed's `metrics.jsonl` (`measured`: section, method, seconds, forwards), where a resumed run
finds it. CLADO's losses, the long part, are kept as checkpoints while they are measured and as
`SECTION/losses.npz` behind that.

Methods that minimise get the average as their limit; where what they find is more than 0.05 below,
a limit 0.05 above it is tried, too, so that few large layers cost no method more than they must.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.comparison.measured import Measured
from experiments.comparison.sections import TOLERANCE, Section
from flexiq_jax import graph
from flexiq_jax.methods import (
  Choices,
  Problem,
  clado,
  curvature,
  hawq,
  layerwise,
  quantune_plan,
  quantune_runs,
  solve,
)
from flexiq_jax.methods.sensitivity import Sensitivity
from flexiq_jax.quant import calibration, rules
from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.runs.workdir import Workdir

QUANTUNE_IMAGES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """One plan.

  Attributes:
    bits: selectable layer -> bits.
    seconds: what solving took.
    columns: further columns of its row.
  """

  bits: dict[str, int]
  seconds: float = 0.0
  columns: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Planner:
  """The plans of one section and seed."""

  def __init__(self, part, measured: Measured, section: Section, folder: Path, workdir: Workdir):
    """Keeps what all methods need; measures nothing.

    Args:
      part: `config.comparison`.
      measured: what there is to start from.
      section: the table.
      folder: for checkpoints and losses; made if missing.
      workdir: of the seed.
    """
    self._part, self._m, self.section = part, measured, section
    self.folder, self._workdir = folder, workdir
    folder.mkdir(parents=True, exist_ok=True)
    self._layers = [layer for layer in measured.network.layers if layer.name in measured.selectable]
    macs = np.array([layer.macs for layer in self._layers], np.float64)
    size = np.array([layer.params for layer in self._layers], np.float64)
    costs = {
      "average bits": np.multiply.outer(macs / macs.sum(), section.bits),
      "size": np.multiply.outer(size / size.sum() / 8, section.bits),
    }
    self.choices = Choices.create(self.names, section.bits, costs)
    self._objectives: dict[str, np.ndarray] = {}
    self._runs: quantune_runs.Runs | None = None

  @property
  def names(self) -> tuple[str, ...]:
    """The layers to choose for, in execution order."""
    return tuple(layer.name for layer in self._layers)

  def plan(self, method: str, budget: float) -> Planned:
    """The bits by one method, within a budget.

    Raises:
      ValueError: no plan keeps the budget; names the smallest that one would keep.
    """
    if method == "uniform":
      return Planned(bits=dict.fromkeys(self.names, round(budget)))
    if method == "quantune":
      return self._quantune(budget)
    objective = self.objective(method)
    choices = dataclasses.replace(self.choices, tied=self._m.tied()) if method == "hawq" else None
    plans = []
    least, *_ = candidates = self._limits(budget)
    for limit in candidates:
      limits = {self._cost: limit}
      problem = Problem(choices=choices or self.choices, objective=objective, limits=limits)
      plans.append(solve(problem, time_limit=self._part.time_limit, seed=self._m.seed))
      if least - plans[-1].costs[self._cost] <= TOLERANCE:
        break
    # The nearest; the first of equal ones, which is not above the budget.
    best = min(plans, key=lambda plan: abs(plan.costs[self._cost] - least))
    columns = {} if best.gap is None else {"gap": best.gap}
    return Planned(bits=best.bits, seconds=sum(plan.seconds for plan in plans), columns=columns)

  def random(self, budget: float, draw: int) -> Planned:
    """Raises random layers by one width at a time while the budget lasts."""
    rng = np.random.default_rng((self._m.seed, draw))
    bits = self.choices.uniform(min)
    widths, cost = self.section.bits, self.choices.costs[self._cost]
    price = dict(zip(self.names, cost.reshape(len(self.names), -1), strict=True))
    left = self.section.limit(budget) - sum(price[name][0] for name in self.names) + 1e-9
    while True:
      at = {name: widths.index(bits[name]) for name in self.names}
      rise = {n: price[n][i + 1] - price[n][i] for n, i in at.items() if i + 1 < len(widths)}
      if not (fits := [n for n, extra in rise.items() if extra <= left]):
        return Planned(bits=bits)
      name = fits[rng.integers(len(fits))]
      bits[name] = widths[widths.index(bits[name]) + 1]
      left -= rise[name]

  def average(self, bits: Mapping[str, int]) -> float:
    """MAC-weighted mean of a plan's bits."""
    return sum(layer.macs * bits[layer.name] for layer in self._layers) / sum(
      layer.macs for layer in self._layers
    )

  @property
  def _cost(self) -> str:
    return "size" if self.section.unit == "size" else "average bits"

  def _limits(self, budget: float) -> tuple[float, ...]:
    limit = self.section.limit(budget)
    return (limit, limit + TOLERANCE) if self.section.unit == "average bits" else (limit,)

  def cost_of(self, method: str) -> dict[str, float]:
    """Columns seconds (of all starts together) and forwards of measuring."""
    key = "clado" if method.startswith("clado") else method
    events = [
      e
      for e in self._workdir.events("measured")
      if (e["section"], e["method"]) == (self.section.name, key)
    ]
    return {
      "seconds": sum(e["seconds"] for e in events),
      "forwards": max((e["forwards"] for e in events), default=0.0),
    }

  def _measure(self, key: str, forwards: float, work: Callable[[], Any]) -> Any:
    """Runs a measurement and notes what it took."""
    begin = time.monotonic()
    result = work()
    self._workdir.event(
      "measured",
      section=self.section.name,
      method=key,
      seconds=time.monotonic() - begin,
      forwards=forwards,
    )
    return result

  def objective(self, method: str) -> np.ndarray:
    """What a method minimises: `[n, n]` or `[n]` (see `methods.Problem`)."""
    if method not in self._objectives:
      if method.startswith("clado"):
        self._clado()
      else:
        self._objectives[method] = self._linear(method)
    return self._objectives[method]

  def _clado(self) -> None:
    """CLADO and its variants, from one measurement."""
    if not self.section.pairs:
      losses = self.losses()
      self._objectives["clado_diagonal"] = self._with_float(losses.singles - losses.base)
      return
    g = clado.matrix(self.choices, self.losses(), clip=self._part.clip)
    projected, clipped = clado.project(g)
    blocks, clipped_blocks = clado.project(clado.block_wise(self.choices, g, self._m.blocks()))
    self._objectives |= {
      "clado": projected,
      "clado_block": blocks,
      "clado_diagonal": clado.diagonal(g),
    }
    np.savez(self.folder / "clado.npz", g=g, projected=projected)
    check = clado.check_unconstrained(
      self.choices, projected, time_limit=self._part.time_limit, seed=self._m.seed
    )
    self._workdir.event(
      "unconstrained",
      section=self.section.name,
      clipped=clipped,
      clipped_blocks=clipped_blocks,
      disagree=check.disagree,
      highest=check.highest,
      least=check.least,
    )

  def losses(self) -> clado.Losses:
    """CLADO's losses, measured or read back."""
    m, stacks = self._m, self._m.stacks(self.section)
    sensitivity = Sensitivity(
      *(m.network.apply, m.network.params, m.network.layers, stacks, self.names),
      loss=self.section.loss or self._part.loss,
      block=self._part.block,
      pairs=self.section.pairs,
    )

    def work():
      with Checkpoints(self.folder / "sensitivity", keep=1) as checkpoints:
        return sensitivity.measure(
          *m.sensitivity_set,
          checkpoints=checkpoints,
          show=lambda line: print(f"seed {m.seed}, {self.section.name}: {line}", flush=True),
        )

    share = m.sensitivity / len(m.images)
    return self._measure("clado", share * sensitivity.forwards, work)

  def _linear(self, method: str) -> np.ndarray:
    """The objectives of MPQCO and HAWQ-v3, `[n]`."""
    m, section, block = self._m, self.section, self._part.block
    share = m.sensitivity / len(m.images)
    network, stacks = m.network, m.stacks(section)
    if method == "mpqco":
      changes = self._measure(
        *(method, 2.0 * len(self.names) * len(section.widths) * share),
        lambda: curvature.relative_logits(
          *(network.apply, network.params, network.layers, stacks, *m.sensitivity_set),
          names=self.names,
          block=block,
        ),
      )
      return self._with_float(changes)

    def traces() -> np.ndarray:
      path = self.folder.parent / "hawq.npz"  # of the float model, so of all sections
      if not path.is_file():
        found = curvature.mean_traces(
          *(jax.random.key(m.seed), network.apply, network.params, network.layers),
          *m.sensitivity_set,
          names=self.names,
          probes=self._part.probes,
          block=block,
        )
        np.savez(path, names=self.names, trace=found.value, error=found.error)
      return np.load(path)["trace"]

    value = self._measure(method, 4.0 * self._part.probes * share, traces)
    errors = curvature.squared_errors(network.layers, network.weights, stacks, self.names)
    return self._with_float(hawq.omega(value, errors))

  def _with_float(self, harm: np.ndarray) -> np.ndarray:
    """What layers do at each width `[n]`, and that they do nothing in floating point."""
    harm = harm.reshape(len(self.names), -1)
    exact = np.zeros((len(harm), len(self.section.bits) - harm.shape[1]))
    return np.concatenate([harm, exact], axis=1).ravel()

  def _quantune(self, budget: float) -> Planned:
    """QuantuneV2 in the best form of the graph."""
    begin = time.monotonic()
    best = self.quantune_forms(budget)[0]
    columns = {"boundaries": float(best.boundaries)}
    return Planned(bits=best.bits, seconds=time.monotonic() - begin, columns=columns)

  def quantune_forms(self, budget: float) -> tuple[quantune_plan.Allocation, ...]:
    """QuantuneV2's plans in all forms of the graph, the best first."""
    pair, total = self.quantune_pair, sum(layer.macs for layer in self._layers)
    extra = quantune_plan.extra_cost(self._layers, pair, "macs")
    most = (self.section.limit(budget) - pair[0]) * total * (1 + 1e-9)
    return quantune_plan.choose(
      *(self.runs(), self.names, pair, extra, most), kept=self.section.kept, fill=True
    )

  @property
  def quantune_pair(self) -> tuple[int, int]:
    """Low and high bits."""
    return min(self.section.bits), max(self.section.bits)

  def runs(self) -> quantune_runs.Runs:
    """QuantuneV2's two runs, at most once."""
    if self._runs is None:
      m = self._m
      images = m.images[:QUANTUNE_IMAGES]
      layers = m.network.layers
      low = calibration.quantize(
        layers,
        # Norms unfolded. A scale per output channel passes through a norm, and so do the codes.
        graph.weights(m.apply, m.params, images[:1]),
        m.calibrated.observations.values,
        m.calibrated.ranges,
        self.quantune_pair[0],
        [layer.name for layer in layers if layer.name not in self.names],
      )
      rule, block = self._quantized(low), self._part.block
      blocks = [images[i : i + block] for i in range(0, len(images), block)]
      self._runs = self._measure(
        *("quantune", 2.0 * len(images) / len(m.images)),
        lambda: quantune_runs.measure(m.apply, m.params, rule, blocks),
      )
    return self._runs

  def _quantized(self, model: rules.QModel) -> rules.Rule:
    """All layers quantized; without those that are in floating point in every plan."""
    uniform = rules.uniform_rule(model, self._m.network.platform)
    floats = set(model).difference(self.names) if self.section.kept == layerwise.FLOAT else ()

    def rule(layer, x, w, contract):
      if layer.name in floats:
        return contract(x, w)
      return uniform(layer, x, w, contract)

    return rule
