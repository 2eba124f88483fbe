"""The products that a batch takes: what tiles can be measured for.

tuning.autotune(set(products(deployed, x).values()), "tiles")
runner = Runner(deployed, sizes=(len(x),), tuning="tiles")
"""

from typing import Any

import jax

from flexiq_jax import graph
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.deployment.model import Deployed
from flexiq_jax.kernels import tile_files


def products(deployed: Deployed, x: Any) -> dict[str, tile_files.Shape]:
  """Shapes of the mixed matmuls, without those of convolutions whose windows slide.

  Args:
    deployed: the model, before or after `place`.
    x: input(s) of the batch's size, arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    Layer name -> shape.
  """
  batch, found = jax.tree.leaves(x)[0].shape[0], {}
  for layer in graph.layers(deployed.wiring.apply, deployed.wiring.params, x):
    d = deployed.layers[layer.name]
    if not isinstance(d, Mixed) or d.slides:
      continue
    w = d.weights
    found[layer.name] = tile_files.Shape(
      m=batch * layer.macs // layer.params,  # each row of x meets each weight once
      k=len(w.x_shift) * w.block,
      n=len(d.scale),
      block=w.block,
    )
  return found
