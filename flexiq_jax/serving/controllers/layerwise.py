"""A peer: layer-wise plans, each a model of its own in which whole layers have 4 bits.

A change loads the layers that differ between two plans, which is part of a model's load time. The
rule is that of `swapping`, among more levels. Its accuracy by level is that of layer-wise plans
(`flexiq_jax.methods`).
"""

from flexiq_jax.serving.controllers.base import Needs
from flexiq_jax.serving.controllers.swapping import Swapped


def layerwise(
  needs: Needs, *, load_s: float = 0.5, share: float = 0.25, hold: float = 5.0, **options: float
) -> Swapped:
  """The controller.

  Args:
    needs: of the plans' levels.
    load_s: seconds of loading a whole model.
    share: of the weights that differ between plans.
    hold: seconds that a change has to last.
    **options: of `Swapped`.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share: {share}; a number in 0..1 is accepted")
  return Swapped(needs=needs, switch_s=share * load_s, hold=hold, **options)
