"""`AdaptiveModel`: a model that runs at any 4-bit ratio, and how it becomes a recipe and back."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexiq_jax import orders
from flexiq_jax.network import Network
from flexiq_jax.orders import Recipe, RecipeLayer, Schedule, Space, require_fit
from flexiq_jax.quant import (
  Cut,
  LowSettings,
  PassListener,
  RangeSettings,
  calibration,
  grouping,
  rules,
  straight,
)

Array = Any


@dataclasses.dataclass(frozen=True)
class AdaptiveModel:
  """A model that runs at any 4-bit ratio; call it as `model(x, ratio)`.

  Attributes:
    network: the float model.
    model: its quantized layers, selectable ones with their 4-bit side.
    schedule: the order in which channel groups go to 4 bits.
    cuts: layer name -> its channel groups and shifts, from which the 4-bit side was made.
    ranges, settings: how clipping ranges were found, and how channels were grouped and lowered.
    dynamic: whether activation shifts follow the live range.
    w_scales: layer name -> weight scales `[N]` that training chose; None where they follow from the
      weights.
  """

  network: Network
  model: rules.QModel
  schedule: Schedule
  cuts: Mapping[str, Cut]
  ranges: RangeSettings
  settings: LowSettings
  dynamic: bool = False
  w_scales: Mapping[str, Array] | None = None

  def __call__(self, x: Array, ratio: float) -> Array:
    """Logits with `ratio` (0..1) of the selectable MACs in 4 bits; compiled once for all ratios."""
    return self.network.mixed(self.model, self.schedule.masks(ratio), x, self.dynamic)

  def recipe(self, *, model_name: str, method: str, seed: int) -> Recipe:
    """What is to be kept of it (see `orders.recipes`)."""
    layers = []
    for layer in self.network.layers:
      q, cut = self.model[layer.name], self.cuts.get(layer.name)
      chosen: dict[str, Any] = {}
      if cut is not None:
        chosen = {
          "groups": tuple(tuple(g.tolist()) for g in cut.channels),
          "x_shift": tuple(cut.x_shift.tolist()),
          "x_mean": tuple(cut.x_mean.tolist()),
          "low_mean": tuple(cut.low_mean.tolist()),
        }
      layers.append(
        RecipeLayer(
          name=layer.name,
          in_channels=layer.in_channels,
          out_channels=layer.out_channels,
          macs=layer.macs,
          x_scale=float(q.x_scale),
          signed=q.signed,
          **chosen,
        )
      )
    space = self.schedule.space
    starts = np.cumsum((0, *space.sizes))
    return Recipe(
      model=model_name,
      method=method,
      seed=seed,
      settings={
        "ranges": dataclasses.asdict(self.ranges),
        "groups": dataclasses.asdict(self.settings),
      },
      layers=tuple(layers),
      order=tuple(
        (space.names[space.layer[i]], int(i - starts[space.layer[i]])) for i in self.schedule.order
      ),
    )


def space(network: Network, cuts: Mapping[str, Cut]) -> Space:
  """The search space over the groups of `cuts`."""
  names = [layer.name for layer in network.layers if layer.name in cuts]
  return Space.create(
    names,
    [[len(c) for c in cuts[name].channels] for name in names],
    [network.layer(name).macs_per_channel for name in names],
  )


def scores(
  network: Network,
  model: rules.QModel,
  space: Space,
  batches: Iterable[Array],
  progress: PassListener | None = None,
) -> np.ndarray:
  """Error of each channel group alone, float64 `[T]`, over batches of training data."""
  errors = calibration.observe_errors(
    network.apply, network.params, model, batches, progress, network.platform
  )
  return orders.exact_scores(space, errors)


def recipe_settings(recipe: Recipe) -> tuple[RangeSettings, LowSettings]:
  """The settings that a recipe was made with.

  Raises:
    ValueError: this release does not know them.
  """
  try:
    ranges = RangeSettings(**recipe.settings["ranges"])
    return ranges, LowSettings(**recipe.settings["groups"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"recipe: its settings do not fit this release ({error})") from None


def from_recipe(
  network: Network,
  recipe: Recipe,
  dynamic: bool = False,
  w_scales: Mapping[str, Array] | None = None,
) -> AdaptiveModel:
  """Quantizes a float model as a recipe says, without calibration examples.

  Args:
    network: the float model.
    recipe: the recipe.
    dynamic: choose activation shifts at run time.
    w_scales: layer name -> weight scales `[N]`; None takes those that follow from the weights.

  Raises:
    ValueError: the recipe does not fit the model.
  """
  require_fit(recipe, network.layers)
  ranges, settings = recipe_settings(recipe)
  schedule = recipe.schedule()
  layouts = schedule.layer_order()
  model, cuts = {}, {}
  for entry in recipe.layers:
    layer = network.layer(entry.name)
    w = network.weights[entry.name]
    if w_scales is None:
      q = calibration.quantize_layer(layer, w, entry.x_scale, entry.signed, ranges)
    else:
      scales = straight.Scales(jnp.float32(entry.x_scale), jnp.asarray(w_scales[entry.name]))
      q = straight.quantize_layer(layer, w, scales, entry.signed)
    model[entry.name] = q
    if entry.groups:
      cuts[entry.name] = Cut(
        channels=tuple(np.array(g) for g in entry.groups),
        block=orders.shift_blocks(
          layouts[entry.name], orders.groups_per_block(entry.groups, settings.shift_block)
        ),
        x_shift=np.array(entry.x_shift, np.int32),
        x_mean=np.array(entry.x_mean),
        low_mean=np.array(entry.low_mean),
      )
  model = grouping.lower_layers(network.layers, model, cuts, settings)
  return AdaptiveModel(
    network,
    model,
    schedule,
    cuts=cuts,
    ranges=ranges,
    settings=settings,
    dynamic=dynamic,
    w_scales=w_scales,
  )
