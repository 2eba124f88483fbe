"""FlexiQ from end to end: a float model in, a model that runs at any 4-bit ratio out.

    network = flexiq.Network(apply, params, images[:1])
    model = flexiq.quantize(network, [images])
    logits = model(images, ratio=0.5)

`quantize` is the short way. Its steps are functions of their own, for experiments that keep what
lies between them: `observe`, `base_model`, `group`, `lower`, `score`, then an order from
`selection`, then `lay_out`. Steps A to F of docs/flexiq.md.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax import calibration, exact, graph, grouping, rules, selection
from flexiq_jax.calibration import Progress, RangeSettings, Values
from flexiq_jax.graph import Layer
from flexiq_jax.grouping import Cut, Groups, LowSettings
from flexiq_jax.selection import Schedule, Space
from flexiq_jax.selection import recipe as recipes

Array = Any


class Network:
  """A float model with batch norm folded, its layers, and one compiled function per rule.

  Attributes:
    apply, params: the folded model.
    layers: its layers, in execution order.
    skipped: contractions with parameters that are no layers.
    traces: rule -> how often it was traced, once for each batch shape.
    platform: cpu, gpu or tpu, for which its functions are compiled.
    compiled: rule -> its jitted function: `float` and of `(params, x)`, `uniform` of `(model,
      params, x)`, `mixed` and `dynamic` of `(model, masks, params, x)`.
  """

  def __init__(self, apply: graph.Apply, params: Any, x: Any, platform: str | None = None):
    """Folds and traces a model.

    Args:
      apply: pure function `(params, x) -> logits` in inference mode.
      params: pytree of arrays, batch statistics included.
      x: example input `[B, ...]`, an array or a `jax.ShapeDtypeStruct`.
      platform: cpu, gpu or tpu: whose ways of computing exact products are taken (see `exact`).
        None is JAX's default backend.

    Raises:
      ValueError: see `graph.layers`; an unknown platform.
    """
    self.platform = exact.platform_of(platform)
    self.apply, self.params = graph.fold_batch_norm(apply, params, x)
    self.layers = graph.layers(self.apply, self.params, x)
    self.skipped = graph.skipped(self.apply, self.params, x)
    self.traces: collections.Counter[str] = collections.Counter()
    self._weights = functools.partial(graph.weights, self.apply, self.params, x)
    self._runs = functools.partial(graph.run_lengths, self.apply, self.params, x)

  @functools.cached_property
  def weights(self) -> dict[str, Array]:
    """The weights of every layer, behind folded batch norm."""
    return self._weights()

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How many neighbouring input channels of each layer stay together (see `graph.reorder`)."""
    return self._runs()

  def layer(self, name: str) -> Layer:
    """A layer by its name.

    Raises:
      ValueError: there is no such layer.
    """
    for layer in self.layers:
      if layer.name == name:
        return layer
    near = graph.closest(name, [layer.name for layer in self.layers])
    raise ValueError(f"name: no layer {name!r}; closest names: {near}")

  def float(self, x: Array) -> Array:
    """Logits of the float model."""
    return self.compiled["float"](self.params, x)

  def uniform(self, model: rules.QModel, x: Array) -> Array:
    """Logits with every layer at the width it was quantized to."""
    return self.compiled["uniform"](model, self.params, x)

  def mixed(
    self, model: rules.QModel, masks: Mapping[str, Array], x: Array, dynamic: bool = False
  ) -> Array:
    """Logits with the masked channel groups in 4 bits (see `rules.mixed_rule`)."""
    return self.compiled["dynamic" if dynamic else "mixed"](model, masks, self.params, x)

  @functools.cached_property
  def compiled(self):
    def run_float(params, x):
      self.traces["float"] += 1
      return self.apply(params, x)

    def run_uniform(model, params, x):
      self.traces["uniform"] += 1
      return graph.with_rule(self.apply, rules.uniform_rule(model, self.platform))(params, x)

    def run_mixed(model, masks, params, x, dynamic):
      self.traces["dynamic" if dynamic else "mixed"] += 1
      rule = rules.mixed_rule(model, masks, dynamic, platform=self.platform)
      return graph.with_rule(self.apply, rule)(params, x)

    return {
      "float": jax.jit(run_float),
      "uniform": jax.jit(run_uniform),
      "mixed": jax.jit(functools.partial(run_mixed, dynamic=False)),
      "dynamic": jax.jit(functools.partial(run_mixed, dynamic=True)),
    }


@dataclasses.dataclass(frozen=True)
class Observations:
  """What calibration images showed of a network.

  Attributes:
    values: layer name -> histogram of its input in the float model.
    codes: layer name -> int64 `[C, 256]` histogram of 8-bit codes in the 8-bit model.
  """

  values: Mapping[str, Values]
  codes: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FlexiQ:
  """A model that runs at any 4-bit ratio; call it as `model(x, ratio)`.

  Attributes:
    network: the float model.
    model: its quantized layers, selectable ones with their 4-bit side.
    schedule: the order in which channel groups go to 4 bits.
    dynamic: whether activation shifts follow the live range.
  """

  network: Network
  model: rules.QModel
  schedule: Schedule
  dynamic: bool = False

  def __call__(self, x: Array, ratio: float) -> Array:
    """Logits with `ratio` (0..1) of the selectable MACs in 4 bits; compiled once for all ratios."""
    return self.network.mixed(self.model, self.schedule.masks(ratio), x, self.dynamic)


def selectable(
  layers: Sequence[Layer],
  *,
  keep8: Sequence[str] = (),
  first_last: bool = True,
  depthwise: bool = False,
) -> tuple[str, ...]:
  """Names of the layers whose channels may go to 4 bits.

  Args:
    layers: all layers of a model.
    keep8: regular expressions; a layer whose name one of them matches anywhere stays 8-bit.
    first_last: keep the first and the last layer 8-bit.
    depthwise: let depthwise convolutions go to 4 bits.

  Raises:
    ValueError: an expression is invalid or matches no layer, or no layer is left.
  """
  names = [layer.name for layer in layers]
  kept = {names[0], names[-1]} if first_last else set()
  if not depthwise:
    kept |= {layer.name for layer in layers if layer.kind == "depthwise"}
  for pattern in keep8:
    try:
      matched = {name for name in names if re.search(pattern, name)}
    except (re.error, TypeError) as error:
      raise ValueError(f"keep8: {pattern!r} is not a regular expression ({error})") from None
    if not matched:
      near = graph.closest(pattern, names)
      raise ValueError(f"keep8: {pattern!r} matches no layer; closest names: {near}")
    kept |= matched
  if left := tuple(name for name in names if name not in kept):
    return left
  raise ValueError(f"keep8: none of the {len(names)} layers is left for 4 bits")


def observe(
  network: Network,
  batches: Iterable[Array],
  ranges: RangeSettings,
  progress: Progress | None = None,
) -> Observations:
  """Runs the calibration passes (see `calibration`); `batches` is iterated over three times."""
  apply, params = network.apply, network.params
  values = calibration.observe_values(apply, params, batches, progress)
  model = calibration.quantize(network.layers, network.weights, values, ranges)
  platform = network.platform
  codes = calibration.observe_codes(apply, params, model, batches, progress, platform)
  return Observations(values, codes)


def base_model(
  network: Network,
  observations: Observations,
  ranges: RangeSettings,
  bits: int = 8,
  keep8: Sequence[str] = (),
) -> dict[str, rules.QLayer]:
  """All layers at one width, those in `keep8` (names) at 8 bits."""
  return calibration.quantize(
    network.layers, network.weights, observations.values, ranges, bits, keep8
  )


def group(
  network: Network,
  model: rules.QModel,
  observations: Observations,
  names: Sequence[str],
  settings: LowSettings,
) -> dict[str, Groups]:
  """Channel groups and shifts of the layers `names` (see `grouping.group_channels`)."""
  runs = network.runs if settings.whole_heads else {}
  return {
    name: _rounded(
      grouping.group_channels(
        network.layer(name),
        model[name],
        observations.codes[name],
        settings,
        # Where the order is fixed (0), channels are gathered, and any order does.
        max(1, runs.get(name, 1)),
      )
    )
    for name in names
  }


def lay_out(
  network: Network,
  model: rules.QModel,
  observations: Observations,
  groups: Mapping[str, Groups],
  order: np.ndarray,
  settings: LowSettings,
  levels: Iterable[float] = recipes.LEVELS,
) -> tuple[Schedule, dict[str, Groups]]:
  """The schedule of an order, and the shifts that its layout leaves to the groups.

  Without shift blocks both are what was given. With them, the groups of a shift block get shifts in
  common (`grouping.reshift`), and groups that no level tells apart are sorted by the shift that
  they had, so that blocks are homogeneous (`selection.sorted_within`).

  Args:
    network: the float model.
    model: its 8-bit layers.
    observations: of the network, from which `groups` was made.
    groups: from `group`, with shifts of their own.
    order: int `[T]`, in which groups go to 4 bits.
    settings: how channels are grouped and lowered.
    levels: ratios at which the groups in 4 bits stay exactly those of `order`.
  """
  schedule = Schedule(space(network, groups), order)
  if not settings.shift_block:
    return schedule, dict(groups)
  shifts = schedule.space.join({name: g.x_shift for name, g in groups.items()})
  schedule = selection.sorted_within(schedule, levels, shifts)
  shared = {
    name: grouping.reshift(
      network.layer(name),
      model[name],
      observations.codes[name],
      groups[name].channels,
      selection.shift_blocks(layout, settings.groups_per_block(groups[name].channels)),
      settings,
    )
    for name, layout in schedule.layer_order().items()
  }
  return schedule, {name: _rounded(g) for name, g in shared.items()}


def _rounded(groups: Groups) -> Groups:
  """A recipe holds the means in decimals: what it says and what runs are to be the same."""
  return dataclasses.replace(
    groups, x_mean=groups.x_mean.round(4), low_mean=groups.low_mean.round(4)
  )


def lower(
  network: Network, model: rules.QModel, cuts: Mapping[str, Cut], settings: LowSettings
) -> dict[str, rules.QLayer]:
  """Adds the 4-bit side to the layers in `cuts` of an 8-bit model."""
  return {
    name: grouping.lower(network.layer(name), q, cuts[name], settings) if name in cuts else q
    for name, q in model.items()
  }


def space(network: Network, cuts: Mapping[str, Cut]) -> Space:
  """The search space over the groups of `cuts`."""
  names = [layer.name for layer in network.layers if layer.name in cuts]
  return Space.create(
    names,
    [[len(c) for c in cuts[name].channels] for name in names],
    [network.layer(name).macs_per_channel for name in names],
  )


def score(
  network: Network,
  model: rules.QModel,
  groups: Mapping[str, Groups],
  batches: Iterable[Array] | None,
  progress: Progress | None = None,
) -> np.ndarray:
  """Error of each channel group alone, `[T]`: exact over `batches`, or closed-form if None."""
  if batches is None:
    return selection.range_scores(space(network, groups), groups)
  errors = calibration.observe_errors(
    network.apply, network.params, model, batches, progress, network.platform
  )
  return selection.exact_scores(space(network, groups), errors)


def quantize(
  network: Network,
  batches: Iterable[Array],
  *,
  names: Sequence[str] | None = None,
  ranges: RangeSettings | None = None,
  settings: LowSettings | None = None,
  dynamic: bool = False,
  progress: Progress | None = None,
) -> FlexiQ:
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
  ranges, settings = ranges or RangeSettings(), settings or LowSettings()
  observations = observe(network, batches, ranges, progress)
  base = base_model(network, observations, ranges)
  groups = group(network, base, observations, names, settings)
  model = lower(network, base, groups, settings)
  scores = score(network, model, groups, batches, progress)
  order = selection.greedy(space(network, groups), scores)
  schedule, groups = lay_out(network, base, observations, groups, order, settings)
  if settings.shift_block:
    model = lower(network, base, groups, settings)
  return FlexiQ(network, model, schedule, dynamic)


def to_recipe(
  flexiq: FlexiQ,
  cuts: Mapping[str, Cut],
  *,
  model_name: str,
  method: str,
  seed: int,
  ranges: RangeSettings,
  settings: LowSettings,
) -> recipes.Recipe:
  """What is to be kept of a FlexiQ model (see `selection.recipe`); `cuts` from `lay_out`."""
  layers = []
  for layer in flexiq.network.layers:
    q, cut = flexiq.model[layer.name], cuts.get(layer.name)
    chosen: dict[str, Any] = {}
    if cut is not None:
      chosen = {
        "groups": tuple(tuple(g.tolist()) for g in cut.channels),
        "x_shift": tuple(cut.x_shift.tolist()),
        "x_mean": tuple(cut.x_mean.tolist()),
        "low_mean": tuple(cut.low_mean.tolist()),
      }
    layers.append(
      recipes.RecipeLayer(
        name=layer.name,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        macs=layer.macs,
        x_scale=float(q.x_scale),
        signed=q.signed,
        **chosen,
      )
    )
  space = flexiq.schedule.space
  starts = np.cumsum((0, *space.sizes))
  order = tuple(
    (space.names[space.layer[i]], int(i - starts[space.layer[i]])) for i in flexiq.schedule.order
  )
  return recipes.Recipe(
    model=model_name,
    method=method,
    seed=seed,
    settings={"ranges": dataclasses.asdict(ranges), "groups": dataclasses.asdict(settings)},
    layers=tuple(layers),
    order=order,
  )


def recipe_settings(recipe: recipes.Recipe) -> tuple[RangeSettings, LowSettings]:
  """The settings that a recipe was made with.

  Raises:
    ValueError: this release does not know them.
  """
  try:
    ranges = RangeSettings(**recipe.settings["ranges"])
    return ranges, LowSettings(**recipe.settings["groups"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"recipe: its settings do not fit this release ({error})") from None


def from_recipe(network: Network, recipe: recipes.Recipe, dynamic: bool = False) -> FlexiQ:
  """Quantizes a float model as a recipe says, without calibration images.

  Raises:
    ValueError: the recipe does not fit the model.
  """
  recipes.require_fit(recipe, network.layers)
  ranges, settings = recipe_settings(recipe)
  schedule = recipe.schedule()
  layouts = schedule.layer_order()
  model, cuts = {}, {}
  for entry in recipe.layers:
    layer = network.layer(entry.name)
    model[entry.name] = calibration.quantize_layer(
      layer, network.weights[entry.name], entry.x_scale, entry.signed, ranges
    )
    if entry.groups:
      cuts[entry.name] = Cut(
        channels=tuple(np.array(g) for g in entry.groups),
        block=selection.shift_blocks(layouts[entry.name], settings.groups_per_block(entry.groups)),
        x_shift=np.array(entry.x_shift, np.int32),
        x_mean=np.array(entry.x_mean),
        low_mean=np.array(entry.low_mean),
      )
  # Layers in the network's order, whatever the file's.
  model = {layer.name: model[layer.name] for layer in network.layers}
  return FlexiQ(network, lower(network, model, cuts, settings), schedule, dynamic)
