r"""PTMQ (Xu et al., "PTMQ: Post-training Multi-Bit Quantization of Neural Networks", AAAI 2024).

One post-training reconstruction, block by block, gives a model that runs at several widths: the
rounding of weights is learned (rounding.py), and so are the scales of activations, at a low, a
middle and a high width at once. The outputs of the three are mixed, and the higher width teaches
the lower ones (block.py). It takes unlabelled calibration images, and no batch norm, which is
folded.

The authors' code is not public; details that the abstract leaves open are those of a third-party
reimplementation (d7chong/ptmq-pytorch): weights of the losses, Adam, the regularizer 0.01 with its
warm-up of 0.2. It learns one width of weights at a time. Here one rounding serves all: every step
draws the width of the weights from `weight_bits`, each with its own scales; with one entry it is
theirs.

Departures:

- 5,000 steps a block there; the budget here is a setting, and the rates are higher for it.
- Weights are symmetric with the scales of calibration, which stay; other layers keep 8 bits and
  their nearest rounding.
- Activations are quantized where layers read them, so inside of blocks, too, at three widths; it is
  logarithms of scales that are trained.
- Where the mixed output of a block is dropped, the float model's stands (as in QDrop).
- Blocks lie between layers at which the fewest activations cross; of residual networks these are
  the residual blocks.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Segments
from flexiq_jax.methods.base import Method, Runnable
from flexiq_jax.methods.ptmq import block as blocks
from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.methods.ptmq.reconstruction import Reconstruction
from flexiq_jax.methods.ptmq.settings import PtmqSettings
from flexiq_jax.methods.task import Task, sizes
from flexiq_jax.methods.trained import one_width, within
from flexiq_jax.network import Network
from flexiq_jax.quant import exact, rules

Array = Any


class Ptmq(Method):
  """One rounding and three scales of activations, reconstructed block by block."""

  name = "ptmq"
  Settings = PtmqSettings

  @classmethod
  def fits(cls, task: Task) -> bool:
    """See `one_width`."""
    return one_width(task)

  @functools.cached_property
  def uniform(self) -> dict[int, dict[str, rules.QLayer]]:
    """All layers at each width of the groups, with the nearest roundings."""
    start = self.start
    return {b: start.calibrated.uniform(b, keep8=start.kept) for b in self.settings.groups}

  @functools.cached_property
  def grids(self) -> dict[str, blocks.Grid]:
    """Layer name -> its weights and scales at each width, of layers to lower."""
    weights = self.start.network.weights
    return {
      layer.name: blocks.grid(layer, weights[layer.name], self.uniform)
      for layer in self.start.layers
    }

  @functools.cached_property
  def trained(self) -> dict[str, dict[str, Array]]:
    """Roundings (`v`) and logarithms of scales (`log_x`) of each layer to lower."""
    size, count = self.settings.batch_size, len(self.start.x)
    if size > count:
      raise ValueError(f"batch_size: {size}; 1..{count} is accepted, the calibration images")
    widths = blocks.Widths(grids=self.grids, base=self.start.calibrated.base)
    return Reconstruction(
      self.start, self.settings, self.segments, self.trained_blocks, widths, self.note
    ).run()

  @functools.cached_property
  def model(self) -> dict[int, dict[str, rules.QLayer]]:
    """All layers at each width of the groups."""
    network, trained = self.start.network, self.trained
    return {
      bits: finished(network, self.uniform[bits], self.grids, trained, k)
      for k, bits in enumerate(self.settings.groups)
    }

  def at(self, budget: float) -> Runnable:
    """The largest of the three widths that keeps the budget, weights and activations alike."""
    start, settings = self.start, self.settings
    bits = within(settings.groups, budget)
    model = start.once(self.name, lambda: self.model)[bits]
    plan = dict.fromkeys(start.names, bits)
    return Runnable(
      predict=lambda x: start.network.uniform(model, x),
      avg_bits=float(bits),
      sizes=sizes(start.network.layers, plan, start.task.activation_bits, start.task.kept),
      columns={"steps": float(settings.steps * len(self.trained_blocks))},
    )

  @functools.cached_property
  def segments(self) -> Segments:
    """The model, cut into blocks."""
    start = self.start
    return boundaries(start.network, jax.tree.map(lambda a: a[:1], start.x))

  @functools.cached_property
  def trained_blocks(self) -> dict[int, tuple[str, ...]]:
    """Number of each block with layers to lower -> these layers."""
    order = [layer.name for layer in self.start.network.layers]
    ends = [*map(order.index, self.segments.names), len(order)]
    inside = {
      i: tuple(n for n in order[a:b] if n in self.start.names)
      for i, (a, b) in enumerate(itertools.pairwise(ends))
    }
    return {i: names for i, names in inside.items() if names}


def boundaries(network: Network, x: Any) -> Segments:
  """Cuts a model at its first layer, and wherever the fewest activations cross."""
  names = [layer.name for layer in network.layers]

  def crossing(name: str) -> int:
    head = graph.cut(network.apply, network.params, x, [name]).head(rules.float_rule)
    return len(jax.eval_shape(head, network.params, x).values)

  count = {name: crossing(name) for name in names}
  least = min([*count.values()][1:], default=0)
  chosen = [name for name in names if name == names[0] or count[name] == least]
  return graph.cut(network.apply, network.params, x, chosen)


def finished(
  network: Network,
  uniform: rules.QModel,
  grids: dict[str, blocks.Grid],
  trained: dict[str, Any],
  k: int,
) -> dict[str, rules.QLayer]:
  """The quantized layers of width number k, roundings made up."""
  model = dict(uniform)
  for name, own in grids.items():
    layer, q = network.layer(name), uniform[name]
    codes = rounding.hard_codes(own.steps(layer, k), trained["v"][name], q.bits)
    w = codes.astype(jnp.int8)
    scale = own.x_scale[k] * jnp.exp(trained["log_x"][name][k])
    parts = exact.parts(layer, np.asarray(w))
    model[name] = dataclasses.replace(q, w=w, x_scale=scale, parts=parts)
  return model
