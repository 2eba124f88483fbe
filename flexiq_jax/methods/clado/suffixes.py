"""Losses with one layer of a model quantized, or two, that repeat nothing they have in common.

One forward pass for each pair of (layer, bits) would repeat itself. Instead the model is cut at
every layer (`graph.cut`), and what lies before a cut is computed once:

    x -- float --> cut i -- layer i at b --> cut i + 1 -- float --> cut j -- layer j at b' --> loss

For every (i, b) the activations are carried from cut to cut, so a pair costs what follows its
second layer. Behind that no layer needs a choice, and nothing is fake-quantized there. Each piece
compiles once, with the bits traced. Calls follow one another: on a CPU a batch of examples fills
the cores, and batched weights (`vmap` over bits) took 1.7 to 3 times as long on ResNet-20.

| symbol | meaning |
|---|---|
| I | layers to choose for |
| B | bit widths |
| n | examples in a block |
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Live
from flexiq_jax.methods.examples import cross_entropy
from flexiq_jax.methods.layerwise import Stacks, fake_quantized
from flexiq_jax.network import Network
from flexiq_jax.quant import check_one_of, rules

Array = Any


def divergence(z: Array, reference: Array) -> Array:
  """Kullback-Leibler divergence from the float model's prediction, logits `[n, K]` -> `[n]`."""
  log_p = jax.nn.log_softmax(reference)
  rise = jax.nn.log_softmax(z) - log_p
  # The sum of p (exp(rise) - 1) is 0; with it no term is negative and rounding stays small.
  return (jnp.exp(log_p) * (jnp.expm1(rise) - rise)).sum(axis=-1)


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
  "cross_entropy": cross_entropy,
  "kl": divergence,
}


class Suffixes:
  """The pieces of a model; each compiles at its first use.

  Attributes:
    names: the I layers to choose for, in execution order.
    params, stacks: the float model's parameters; all of its layers at every width.
    loss: a name in `LOSSES`.
    tails: float64 `[I]`, share of the model's MACs in each layer and after it.
    traces: how often a piece was traced.
  """

  def __init__(self, network: Network, stacks: Stacks, names: Sequence[str], loss: str):
    """Plans the cuts; for the arguments see `losses.LayerLosses`."""
    check_one_of("loss", loss, tuple(LOSSES))
    known = [layer.name for layer in network.layers]
    if [*stacks.names] != known:
      wrong = sorted(set(stacks.names) ^ set(known)) or ["their order"]
      raise ValueError(f"stacks: of other layers than the model has; {', '.join(wrong)} differ")
    names = [*names]
    if unknown := [name for name in names if name not in known]:
      near = graph.closest(unknown[0], known)
      raise ValueError(f"names: no layer {unknown[0]!r}; closest names: {near}")
    if not names or names != [name for name in known if name in names]:
      raise ValueError(f"names: {names}; expected layers of the model, once, in execution order")
    self.names, self.loss, self.params, self.stacks = tuple(names), loss, network.params, stacks
    self.traces = 0
    macs = np.array([layer.macs for layer in network.layers], np.float64)
    self.tails = np.array([macs[known.index(name) :].sum() for name in names]) / macs.sum()
    self._segments = graph.Segments(apply=network.apply, names=self.names)
    self._distance = jax.jit(LOSSES[loss])
    self._float, self._head = jax.jit(network.apply), jax.jit(self._segments.head(rules.float_rule))
    self._steps = [self._piece(self._segments.step, i) for i in range(len(names))]
    self._tails = [self._piece(self._segments.tail, i, LOSSES[loss]) for i in range(len(names))]

  def start(self, x: Array) -> tuple[Array, Live]:
    """Examples `[n, ...]` -> (the float model's logits `[n, K]`, activations at cut 0).

    Raises:
      ValueError: the model's result is not `[n, K]`.
    """
    logits = self._float(self.params, x)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(x):
      raise ValueError(f"apply: its result has shape {shape}; expected logits [n, K]")
    return logits, self._head(self.params, x)

  def base(self, logits: Array, target: Array) -> np.ndarray:
    """The float model's loss on each example, float32 `[n]`."""
    return np.asarray(self._distance(logits, target))

  def pass_by(self, i: int, live: Live) -> Live:
    """From cut i to the next in floating point."""
    return self._step(i, len(self.stacks.bits), live)

  def row(
    self, i: int, live: Live, target: Array, pairs: bool = True
  ) -> tuple[np.ndarray, np.ndarray]:
    """All losses in which layer number i is the first that is quantized.

    Args:
      i: number of the layer in `names`.
      live: activations of the float model at cut i.
      target: what the loss compares logits with: labels int `[n]`, or the float model's logits.
      pairs: whether later layers are quantized, too.

    Returns:
      float32 `[B, n]`, with this layer alone at each width; float32 `[B, I - i - 1, B, n]`, with a
      later layer at a width, too: zeros without pairs.
    """
    widths, singles, both = range(len(self.stacks.bits)), [], []
    for b in widths:
      after, losses = self._step(i, b, live), []
      for j in range(i + 1, len(self.names)):
        losses += [self._tail(j, c, after, target) for c in widths] if pairs else []
        after = self.pass_by(j, after)
      singles.append(self._distance(after, target))
      both.append([np.asarray(loss) for loss in losses])
    shape = (len(widths), len(self.names) - i - 1, len(widths), len(target))
    found = np.array(both, np.float32).reshape(shape) if pairs else np.zeros(shape, np.float32)
    return np.stack(singles), found

  def _step(self, i: int, k: int, live: Live) -> Any:
    return self._steps[i](self.stacks.stack(self.names[i]), self.params, np.int32(k), live)

  def _tail(self, i: int, k: int, live: Live, target: Array) -> Array:
    stack = self.stacks.stack(self.names[i])
    return self._tails[i](stack, self.params, np.int32(k), live, target)

  def _piece(self, part: Callable, i: int, loss: Callable | None = None) -> Callable:
    """Jitted `(stack, params, k, live[, target])`: a piece with layer i at width number k."""

    def run(stack, params, k, live, *target):
      self.traces += 1

      def rule(layer, x, w, contract):
        if layer.name != self.names[i]:
          return contract(x, w)
        return fake_quantized(layer, x, w, contract, stack, k)

      out = part(i, rule)(params, live)
      return loss(out, *target) if loss else out

    return jax.jit(run)
