"""Effects of channel groups by finite differences: flip one group, run the model, subtract.

The peer of `influence`, with the same interface: as many forward passes as there are groups, where
that takes a few backward passes. A flip leaves everything before its layer as it is, so the model
is cut at a few layers (`graph.cut`): what lies before a cut runs once for a block of examples, what
follows runs for each group after it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.quant import rules
from flexiq_jax.runs import distributed
from flexiq_jax.search.fitness import DISTANCES, Fitness
from flexiq_jax.search.gram.sums import Report, Sums
from flexiq_jax.search.gram.surrogate import Quadratic
from flexiq_jax.search.gram.ties import Ties

Array = Any


def _divergence_metric(d: Array, z: Array) -> Array:
  p = jax.nn.softmax(z)[..., None, :]
  return jnp.sqrt(p / 2) * (d - (p * d).sum(axis=-1, keepdims=True))


# Changes d `[B, T, K]` of logits z `[B, K]` -> vectors whose squared norm is the distance's second
# order.
METRICS: dict[str, Callable[[Array, Array], Array]] = {
  "l2": lambda d, z: d,
  "kl": _divergence_metric,
}


class Flips:
  """Measures quadratic models of a fitness by flipping every group (or tie of groups).

  Attributes:
    ties: the groups that count as one.
    forwards_each: cost of one `measure` in forward passes over the search examples, by MACs.
    block: examples in one pass.
  """

  def __init__(self, fitness: Fitness, ties: Ties, *, cuts: int = 4):
    """Plans the cuts; functions compile at the first `measure`.

    Args:
      fitness: what is to be predicted.
      ties: groups that count as one.
      cuts: at most so many tails of the model are compiled.

    Raises:
      ValueError: the model's result is not `[B, K]`.
    """
    if fitness.reference.ndim != 2:
      raise ValueError(
        f"effects: flips need logits [B, K], not {list(fitness.reference.shape)}; take probes"
      )
    self._fitness, self.ties, self.block = fitness, ties, fitness.block
    names = fitness.space.names
    layers = [layer for layer in fitness.layers if layer.name in names]
    at = graph.balanced(layers, min(cuts, len(layers)))
    x = jax.ShapeDtypeStruct((1, *fitness.host_examples.shape[1:]), fitness.host_examples.dtype)
    segments = graph.cut(fitness.apply, fitness.params, x, at)
    order = {layer.name: i for i, layer in enumerate(fitness.layers)}
    starts = [order[name] for name in segments.names]
    layer_of = [order[names[i]] for i in ties.space.layer]
    self._cut = np.searchsorted(starts, layer_of, side="right") - 1  # the cut before each tie
    macs = np.array([layer.macs for layer in fitness.layers], np.float64)
    tails = np.array([macs[start:].sum() for start in starts]) / macs.sum()
    self.forwards_each = float(tails[self._cut].sum()) + 1.0
    split = fitness.space.split

    def piece(part: Callable[[rules.Rule], Any]) -> Any:
      def run(model, params, mask, x):
        rule = rules.mixed_rule(model, split(mask), platform=fitness.platform)
        return part(rule)(params, x)

      return jax.jit(run)

    self._head = piece(segments.head)
    count = range(len(segments.names))
    self._steps = [piece(lambda rule, i=i: segments.step(i, rule)) for i in count]
    self._tails = [piece(lambda rule, i=i: segments.tail(i, rule)) for i in count]

  def describe(self) -> str:
    """What a measurement costs, for the user, in one line."""
    total, examples = self.ties.space.total, self._fitness.examples
    return (
      f"Gram matrix of {total} groups, each flipped alone, on {examples} examples: as much as "
      f"{self.forwards_each:.0f} forward passes ({len(self._tails)} cuts); "
      f"{2 * 8 * total**2 / 2**20:.0f} MiB of matrices, blocks of {self.block} examples"
    )

  def measure(
    self, key: Array, base: np.ndarray, report: Report | None = None
  ) -> tuple[Quadratic, float]:
    """The quadratic model around a mask; see `Influence.measure`. Nothing is random here."""
    del key
    fitness, total = self._fitness, self.ties.space.total
    base = np.asarray(base)
    distance, metric = DISTANCES[fitness.distance], METRICS[fitness.distance]
    slope_of = jax.grad(lambda z, target: distance(z, target).sum() / 2)
    sums, groups = Sums(total), self.ties.expand(base)
    flipped = self.ties.expand(base ^ np.eye(total, dtype=bool))
    for start in distributed.mine(range(0, fitness.examples, self.block)):
      rows = np.arange(start, start + self.block) % fitness.examples
      used = min(self.block, fitness.examples - start)
      constant = (fitness.model, fitness.params)
      live = [self._head(*constant, groups, fitness.host_examples[rows])]
      for step in self._steps:
        live.append(step(*constant, groups, live[-1]))
      z, target = live.pop()[:used], fitness.reference[rows][:used]
      changes = np.stack(
        [
          np.asarray(self._tails[cut](*constant, mask, live[cut]))[:used]
          for cut, mask in zip(self._cut, flipped, strict=True)
        ],
        axis=1,
      )  # [b, T, K]
      changes -= np.asarray(z)[:, None]
      slope = np.asarray(slope_of(z, target))
      sums.add_slope(
        np.asarray(distance(z, target)),
        np.einsum("btk,bk->t", changes, slope, dtype=np.float64),
      )
      for example in np.asarray(metric(changes, z)):
        own = example @ example.T
        sums.add_gram(own, np.square(own))
      if report:
        report((start + used) / fitness.examples)
    fitness.forwards += self.forwards_each
    return sums.model(base, fitness.examples)
