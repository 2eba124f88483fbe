"""The short way: a float model in, a model that runs at any 4-bit ratio out.

    network = Network(apply, params, x[:1])
    model = flexiq.quantize(network, [x])
    logits = model(x, ratio=0.5)
    better = flexiq.improve(model, x)

Its steps are objects of their own, for those who keep what lies between them: `Calibrated`,
`Grouped`, an order from `orders` or `search`, `AdaptiveModel`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexiq_jax import adaptive, orders, search
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.calibrated import calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule
from flexiq_jax.quant import LowSettings, PassListener, RangeSettings, selectable
from flexiq_jax.search import SearchSettings

Array = Any


def quantize(
  network: Network,
  batches: Iterable[Array],
  *,
  names: Sequence[str] | None = None,
  ranges: RangeSettings | None = None,
  settings: LowSettings | None = None,
  dynamic: bool = False,
  progress: PassListener | None = None,
) -> AdaptiveModel:
  """Calibrates a float model, scores its channel groups and orders them greedily.

  Args:
    network: the float model.
    batches: calibration inputs `[B, ...]` from training data; iterated over several times.
    names: layers that may go to 4 bits; all but the first, the last and depthwise ones if None.
    ranges: how clipping ranges are found.
    settings: how channels are grouped and lowered.
    dynamic: choose activation shifts at run time.
    progress: called as `progress(pass name, examples done)`.
  """
  names = selectable(network.layers) if names is None else names
  calibrated = calibrate(network, batches, ranges, progress)
  grouped = calibrated.group(names, settings or LowSettings())
  order = orders.greedy(grouped.space, grouped.scores(progress=progress))
  return dataclasses.replace(grouped.ordered(order), dynamic=dynamic)


def improve(
  model: AdaptiveModel,
  x: Array,
  settings: SearchSettings | None = None,
  *,
  seed: int = 0,
  show: Callable[[str], None] | None = None,
) -> AdaptiveModel:
  """Searches a better order for a model, on all devices.

  Args:
    model: as `quantize` makes it, without shift blocks.
    x: `[n, ...]` training examples.
    settings: of the search.
    seed: of everything random in it.
    show: called with a line of progress now and then.

  Returns:
    The model with the order that was found.

  Raises:
    ValueError: as `search`, and for a model with shift blocks.
  """
  if any(q.low is not None and q.low.block is not None for q in model.model.values()):
    raise ValueError(
      "model: its shift blocks go with the order it has; search in a model whose shift_block is 0, "
      "then share the shifts along the order that was found (`Grouped.ordered`)"
    )
  network, space = model.network, model.schedule.space
  found = search.search(
    network,
    model.model,
    space,
    adaptive.scores(network, model.model, space, [x]),
    x,
    settings or SearchSettings(),
    seed=seed,
    show=show,
    mesh=search.population_mesh(),
  )
  return dataclasses.replace(model, schedule=Schedule(space, found.order))
