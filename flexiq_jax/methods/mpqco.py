"""MPQCO's metric: what errors of a layer's weights do to the logit of the label.

As CLADO's code computes it (JamesTuna/CLADO_MPQ). The weights alone are looked at; activations stay
in floating point.

| symbol | meaning |
|---|---|
| I | layers to choose for |
| B | bit widths |
| z | logit of an example's label |
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.layerwise import Stacks
from flexiq_jax.methods.programmed import Programmed
from flexiq_jax.network import Network


class Mpqco(Programmed):
  """The relative change of the label's logit, squared."""

  name = "mpqco"

  def measured(self) -> np.ndarray:
    """`relative_logits`, and nothing where layers are in floating point."""
    start, names = self.start, self.start.choices.names
    changes = self.measure(
      2.0 * len(names) * len(start.task.widths) * start.share,
      lambda: relative_logits(
        start.network, start.stacks, start.examples, names, block=self.settings.block
      ),
    )
    return start.with_float(changes)


def relative_logits(
  network: Network, stacks: Stacks, examples: Examples, names: Sequence[str], *, block: int = 64
) -> np.ndarray:
  """MPQCO's metric, mean of ((dz/dW . (Q_b(W) - W)) / z)^2 / 2 over examples, float64 `[I * B]`.

  Derivatives are taken forward along each error of weights, which gives all examples of a block at
  once.

  Args:
    network: the float model.
    stacks: all of its layers, at every width.
    examples: of the training set.
    names: which layers.
    block: examples in one pass.

  Returns:
    An objective for `Problem`, in the order of `Choices.create(names, stacks.bits, ...)`.

  Raises:
    ValueError: an unknown layer, or a logit of zero.
  """
  chosen = [network.layer(name) for name in names]

  @jax.jit
  def changes(stacks, params, i, k, x, y):
    def label_logit(t):
      def rule(layer, x, w, contract):
        if layer not in chosen:
          return contract(x, w)
        error = stacks.stack(layer.name).dequantized(layer, k) - w
        return contract(x, w + jnp.where(chosen.index(layer) == i, t, 0.0) * error)

      logits = graph.with_rule(network.apply, rule)(params, x)
      return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]

    z, dz = jax.jvp(label_logit, (jnp.float32(0),), (jnp.float32(1),))
    return jnp.square(dz / z) / 2

  widths = len(stacks.bits)
  total = np.zeros((len(chosen), widths))
  for x, y, used in examples.blocks(block):
    for i, k in np.ndindex(*total.shape):
      each = changes(stacks, network.params, np.int32(i), np.int32(k), x, y)
      total[i, k] += np.asarray(each, np.float64)[used].sum()
  if not np.isfinite(total).all():
    raise ValueError("examples: the logit of a label is 0 or not finite, so is its relative change")
  return total.ravel() / len(examples)
