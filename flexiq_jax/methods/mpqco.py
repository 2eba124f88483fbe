"""MPQCO's metric: what errors of a layer's weights do to the logit of the label.

As CLADO's code computes it (JamesTuna/CLADO_MPQ). The weights alone are looked at; activations stay
in floating point.

| symbol | meaning |
|---|---|
| I | layers to choose for |
| B | bit widths |
| z | logit of an example's label |
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Layer
from flexiq_jax.methods.examples import blocks
from flexiq_jax.methods.layerwise import Stacks, picked
from flexiq_jax.methods.programmed import Programmed

Array = Any


class Mpqco(Programmed):
  """The relative change of the label's logit, squared."""

  name = "mpqco"

  def measured(self) -> np.ndarray:
    """`relative_logits`, and nothing where layers are in floating point."""
    start, network, names = self.start, self.start.network, self.start.choices.names
    changes = self.measure(
      2.0 * len(names) * len(start.task.widths) * start.share,
      lambda: relative_logits(
        *(network.apply, network.params, network.layers, start.stacks),
        *(start.examples.x, start.examples.labels),
        names=names,
        block=self.settings.block,
      ),
    )
    return start.with_float(changes)


def relative_logits(
  apply: graph.Apply,
  params: Any,
  layers: Sequence[Layer],
  stacks: Stacks,
  x: Array,
  labels: Array,
  *,
  names: Sequence[str] | None = None,
  block: int = 64,
  report: Callable[[float], None] | None = None,
) -> np.ndarray:
  """MPQCO's metric, mean of ((dz/dW . (Q_b(W) - W)) / z)^2 / 2 over examples, float64 `[I * B]`.

  As CLADO's code computes it, with the logit of the label as z. Derivatives are taken forward along
  each error of weights, which gives all examples of a block at once.

  Args:
    apply: the float model, batch norm folded.
    params: its parameters.
    layers: its layers.
    stacks: all of them, at every width.
    x: `[n, ...]` examples of the training set.
    labels: int `[n]`.
    names: which layers; None: all.
    block: examples in one pass.
    report: called with the share of the work that is done.

  Returns:
    An objective for `Problem`, in the order of `Choices.create(names, stacks.bits, ...)`.

  Raises:
    ValueError: arrays that do not fit, an unknown layer, or a logit of zero.
  """
  chosen = picked(layers, names)

  @jax.jit
  def changes(stacks, params, i, k, x, y):
    def label_logit(t):
      def rule(layer, x, w, contract):
        if layer not in chosen:
          return contract(x, w)
        error = stacks.stack(layer.name).dequantized(layer, k) - w
        return contract(x, w + jnp.where(chosen.index(layer) == i, t, 0.0) * error)

      logits = graph.with_rule(apply, rule)(params, x)
      return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]

    z, dz = jax.jvp(label_logit, (jnp.float32(0),), (jnp.float32(1),))
    return jnp.square(dz / z) / 2

  widths = len(stacks.bits)
  total = np.zeros((len(chosen), widths))
  for done, own, y, used in blocks(x, labels, block):
    for i, k in np.ndindex(*total.shape):
      each = changes(stacks, params, np.int32(i), np.int32(k), own, y)
      total[i, k] += np.asarray(each, np.float64)[used].sum()
    if report:
      report(done)
  if not np.isfinite(total).all():
    raise ValueError("x: the logit of a label is 0 or not finite; its relative change is not")
  return total.ravel() / len(x)
