"""In which order the rows of a deployed model's convolutions go: by image, or by pixel.

By pixel, images are innermost: a window position is then a whole block of rows further, which the
TPU kernel reads where it lies (`kernels.tpu.pixels`). A chain of layers hands its codes on in one
order, so all convolutions of a model go the same way. What lies between them keeps its own shapes:
an order is a transposition that XLA makes by the layout it gives an array.
"""

from collections.abc import Mapping
from typing import Any

from flexiq_jax import kernels
from flexiq_jax.deployment import patches
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.deployment.wiring import Wiring
from flexiq_jax.graph import Traced


def by_pixel(
  layers: Mapping[str, Any],
  wiring: Wiring,
  traced: Traced,
  images: int,
  *,
  implementation: str | None = None,
  platform: str | None = None,
  kind: str | None = None,
  **_: Any,
) -> bool:
  """Whether rows go by pixel: where windows slide and the TPU kernel takes all images side by side.

  Args:
    layers: layer name -> the deployed layer.
    wiring: of the model.
    traced: the model at this batch.
    images: of the batch.
    implementation: of the mixed matmul, as the next.
    platform: see `kernels.mixed_matmul`, also for the next.
    kind: a TPU.
  """
  if wiring.dynamic or wiring.between:  # these keep the rows of an example together
    return False
  found, convolves = [], {layer.name: bool(layer.window) for layer in traced.layers.values()}
  for i, layer in traced.layers.items():
    d, eqn = layers[layer.name], traced.jaxpr.jaxpr.eqns[i]
    if not isinstance(d, Mixed):
      continue
    if d.feeds and convolves[layer.name] != convolves[d.feeds]:
      return False
    if not d.slides:
      continue
    if (implementation or kernels.choose_implementation(d.weights, platform, kind)) != "tpu":
      return False
    from flexiq_jax.kernels import tpu

    window = patches.window(layer, eqn.params, eqn.invars[1 - traced.sides[i]].aval.shape)
    assert window is not None
    k, n = d.weights.w8.shape
    found.append(tpu.of_batch(window, images, k // d.weights.steps, n).images > 1)
  return bool(found) and all(found)
