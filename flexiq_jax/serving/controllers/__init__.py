"""How the ratio follows the load: one controller a file, behind one signature (`base`).

| name         | rule                                                        | a change costs |
| ------------ | ----------------------------------------------------------- | -------------- |
| `fixed`      | one ratio                                                   | nothing        |
| `load`       | the smallest ratio that carries the estimated load          | nothing        |
| `predictive` | the same for a forecast                                     | nothing        |
| `oracle`     | the smallest ratio that keeps all in time who will come     | nothing        |
| `swapping`   | `load` over two whole models                                | a model's load |
| `layerwise`  | `load` over layer-wise plans                                | part of it     |
"""

from collections.abc import Callable
from typing import Any

from flexiq_jax.serving.controllers.base import Controller, Needs, Rate, Seen, estimate, needs
from flexiq_jax.serving.controllers.fixed import Fixed
from flexiq_jax.serving.controllers.layerwise import layerwise
from flexiq_jax.serving.controllers.load import Load
from flexiq_jax.serving.controllers.oracle import Oracle
from flexiq_jax.serving.controllers.predictive import Predictive
from flexiq_jax.serving.controllers.swapping import swapping
from flexiq_jax.serving.profile import Profile

__all__ = [
  "CONTROLLERS",
  "Controller",
  "Fixed",
  "Load",
  "Needs",
  "Oracle",
  "Predictive",
  "Rate",
  "Seen",
  "create",
  "estimate",
  "layerwise",
  "needs",
  "swapping",
]

CONTROLLERS: dict[str, Callable[..., Any]] = {
  "fixed": lambda *, needs, **options: Fixed(**options),
  "load": Load,
  "predictive": Predictive,
  "oracle": Oracle,
  "swapping": swapping,
  "layerwise": layerwise,
}


def create(
  name: str,
  profile: Profile,
  *,
  levels: tuple[float, ...] | None = None,
  target: float,
  largest: int | None = None,
  **options: Any,
) -> Controller:
  """A controller by its name.

  Args:
    name: a key of `CONTROLLERS`.
    profile: what it plans with.
    levels: ratios that it may choose; None takes the profile's.
    target: seconds within which a request is to be answered.
    largest: examples in a batch at most; None takes the profile's largest size.
    **options: of the controller: see its file. `fixed` needs `ratio`, `oracle` needs `arrivals`.

  Raises:
    ValueError: an unknown name or option, or one that is missing or out of range.
  """
  if name not in CONTROLLERS:
    raise ValueError(f"controller: {name!r}; one of {', '.join(CONTROLLERS)} is accepted")
  levels = profile.ratios if levels is None else tuple(levels)
  of = needs(profile, levels, target, profile.sizes[-1] if largest is None else largest)
  try:
    return CONTROLLERS[name](needs=of, **options)
  except TypeError as error:
    raise ValueError(f"controller {name!r}: {error}") from None
