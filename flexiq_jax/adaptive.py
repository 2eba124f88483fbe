"""`AdaptiveModel`: a model that runs at any 4-bit ratio, and how it becomes a recipe and back."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexiq_jax import models, orders
from flexiq_jax.network import Network
from flexiq_jax.orders import (
  LEVELS,
  Recipe,
  RecipeLayer,
  Schedule,
  Space,
  recipes,
  require_fit,
  weights,
)
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


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class AdaptiveModel:
  """A model that runs at any 4-bit ratio; call it as `model(x, ratio)`.

  Attributes:
    network: the float model.
    model: its quantized layers, selectable ones with their 4-bit side.
    schedule: the order in which channel groups go to 4 bits.
    cuts: layer name -> its channel groups and shifts, from which the 4-bit side was made.
    ranges, settings: how clipping ranges were found, and how channels were grouped and lowered.
    dynamic: whether activation shifts follow the live range.
    method, seed: how the order was found.
    drops: level -> percent of the calibration examples' predictions that are not the float model's;
      empty where that was not measured, or results are no logits.
    grouped: the `Grouped` that it was made from, with what calibration measured; None where it was
      made from a recipe.
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
  method: str = "greedy"
  seed: int = 0
  drops: Mapping[float, float] = dataclasses.field(default_factory=dict)
  grouped: Any = None
  w_scales: Mapping[str, Array] | None = None

  def __call__(self, x: Array, ratio: Any) -> Array:
    """What the float model returns, with a share of the MACs in 4 bits.

    Args:
      x: `[B, ...]`.
      ratio: share of the selectable MACs in 4 bits, 0..1; compiled once for all ratios. It may be
        traced, as under `jax.jit`.
    """
    return self.network.mixed(self.model, self.schedule.masks(ratio), x, self.dynamic)

  def __repr__(self) -> str:
    space = self.schedule.space
    return (
      f"AdaptiveModel({len(self.network.layers)} layers, {len(space.names)} of them with "
      f"{space.total} groups, {self.method} order)"
    )

  def __str__(self) -> str:
    layers, space, settings = self.network.layers, self.schedule.space, self.settings
    some = len(space.names)
    macs = sum(layer.macs for layer in layers if layer.name in space.names)
    share = 100 * macs / sum(layer.macs for layer in layers)
    shifts = f", shifts of {settings.shift_block} channels" if settings.shift_block else ""
    used = [f"{sum(self.schedule.boundaries(r).values())} at {100 * r:g} %" for r in LEVELS]
    drops = [f"{drop:.1f} % at {100 * level:g} %" for level, drop in self.drops.items()]
    return "\n".join(
      (
        f"layers  {len(layers)}; {some} of them may go to 4 bits: {share:.0f} % of MACs",
        f"groups  {space.total}, of {settings.group_size} channels{shifts}",
        f"levels  groups in 4 bits: {', '.join(used)}",
        f"order   {self.method}, seed {self.seed}{', dynamic shifts' if self.dynamic else ''}",
        f"drop    predictions that change: {', '.join(drops) or 'not measured'}",
      )
    )

  def __reduce__(self):
    raise TypeError(
      "model: its float model is a function, which cannot be pickled; write it by "
      "model.save(folder) and read it by flexiq_jax.load(folder, net_or_apply, params)"
    )

  def save(self, directory: str | os.PathLike, *, name: str = "") -> Path:
    """Writes the model as `recipe.json` into a folder; read it by `flexiq_jax.load`.

    The float weights are not written, those of a finetuned model are, beside it.

    Args:
      directory: made if missing; a recipe in it is replaced.
      name: of the float model, for people; the folder's if empty.

    Returns:
      The folder.

    Raises:
      ValueError: there is a file of that name.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
      raise ValueError(f"directory: {directory} is a file; name a folder")
    directory.mkdir(parents=True, exist_ok=True)
    name = name or directory.resolve().name
    recipe = self.recipe(model_name=name, method=self.method, seed=self.seed)
    save(directory / "recipe.json", recipe, self)
    return directory

  def recipe(self, *, model_name: str, method: str, seed: int) -> Recipe:
    """What is to be kept of it (see `orders.recipes`)."""
    example = self.network.example
    one = hasattr(example, "shape")
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
        "dynamic": self.dynamic,
      },
      layers=tuple(layers),
      order=tuple(
        (space.names[space.layer[i]], int(i - starts[space.layer[i]])) for i in self.schedule.order
      ),
      fingerprint=self.network.fingerprint,
      input=(example.shape, str(example.dtype)) if one else None,
      drops=self.drops,
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
  dynamic: bool | None = None,
  *,
  other_weights: bool = False,
  w_scales: Mapping[str, Array] | None = None,
) -> AdaptiveModel:
  """Quantizes a float model as a recipe says, without calibration examples.

  Args:
    network: the float model.
    recipe: the recipe.
    dynamic: whether activation shifts follow the live range; None takes what the recipe says.
    other_weights: whether the model may have other weights than those the recipe was made for.
    w_scales: layer name -> weight scales `[N]`; None takes those that follow from the weights.

  Raises:
    ValueError: the recipe does not fit the model.
  """
  require_fit(recipe, network.layers)
  made, given = recipe.fingerprint, network.fingerprint
  if made and given and made != given and not other_weights:
    raise ValueError(
      f"recipe: made for {recipe.model!r} with other weights (SHA-256 {made[:12]}..., "
      f"these have {given[:12]}...); its ranges and order belong to those. Quantize "
      "anew, or say other_weights=True if it is meant"
    )
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
    *(network, model, schedule, cuts, ranges, settings),
    dynamic=recipe.settings.get("dynamic", False) if dynamic is None else dynamic,
    method=recipe.method,
    seed=recipe.seed,
    drops=recipe.drops,
    w_scales=w_scales,
  )


def save(path: str | os.PathLike, recipe: Recipe, model: AdaptiveModel) -> None:
  """Writes a model's recipe and, beside it, the weights of a finetuned one (`orders.weights`)."""
  if model.w_scales is None:
    recipes.save(path, recipe)
    return
  arrays = {
    f"params/{path}": np.asarray(a) for path, a in models.flatten(model.network.params).items()
  }
  arrays |= {f"w_scale/{name}": np.asarray(scale) for name, scale in model.w_scales.items()}
  weights.save(path, recipe, arrays)


def load(
  path: str | os.PathLike,
  network: Network,
  dynamic: bool | None = None,
  *,
  other_weights: bool = False,
) -> AdaptiveModel:
  """The model of a recipe, with the weights beside it where the recipe names some.

  Args:
    path: of the recipe.
    network: the float model that it was made from.
    dynamic: see `from_recipe`.
    other_weights: see `from_recipe`.

  Raises:
    FileNotFoundError: no recipe, or its weights are missing.
    ValueError: one of the files is damaged, or they do not go with each other or with the model.
  """
  recipe = recipes.load(path)
  if not recipe.weights:
    return from_recipe(network, recipe, dynamic, other_weights=other_weights)
  require_fit(recipe, network.layers)
  arrays, have = weights.load(path, recipe), models.flatten(network.params)
  want = {f"params/{name}": (a.shape, a.dtype) for name, a in have.items()}
  for layer in network.layers:
    want[f"w_scale/{layer.name}"] = ((layer.out_channels,), np.dtype(np.float32))
  found = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  if wrong := sorted(n for n in want.keys() | found.keys() if want.get(n) != found.get(n)):
    sides = [
      f"{side[wrong[0]][1]} {list(side[wrong[0]][0])}" if wrong[0] in side else "missing"
      for side in (found, want)
    ]
    raise ValueError(
      f"recipe: the weights beside {path} do not fit the model: {wrong[0]} is {sides[0]} there and "
      f"{sides[1]} in the model"
    )
  params = models.unflatten({name: arrays[f"params/{name}"] for name in have})
  network = network.with_params(params)
  scales = {layer.name: arrays[f"w_scale/{layer.name}"] for layer in network.layers}
  return from_recipe(network, recipe, dynamic, other_weights=other_weights, w_scales=scales)
