"""A peer: two whole models, INT8 and INT4, of which the device holds one.

The rule is that of `load`, with two levels and a change that keeps the device for the time of
loading a model. Since a change is dear it comes down late: INFaaS waits for 10 to 20 seconds.
"""

from flexiq_jax.serving.controllers.base import Needs
from flexiq_jax.serving.controllers.load import Load


def swapping(needs: Needs, *, load_s: float = 0.5, hold: float = 10.0, **options: float) -> Load:
  """The controller.

  Args:
    needs: of the two levels.
    load_s: seconds of loading a model.
    hold: seconds of less need before it goes down.
    **options: of `load.Load`.

  Raises:
    ValueError: there are not two levels.
  """
  if len(needs.levels) != 2:
    raise ValueError(f"levels: {needs.levels}; two are accepted, of INT8 and of INT4")
  return Load(needs=needs, switch_s=load_s, hold=hold, **options)
