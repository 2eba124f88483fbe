"""`recipe.json`: a schedule on disk, readable by a person and enough to run it.

The file holds what calibration and selection decided: each layer's activation quantizer, its
channel groups with their activation shifts and mean codes, and the one order of all groups. Weight
codes, weight shifts and bias corrections are functions of that, of the weights and of the settings
in the file: a recipe and the float weights give the quantized model again, bit for bit, without
calibration examples. To other weights it would give nonsense, so it holds a fingerprint of its own
(see `network.fingerprint`).

The key `levels` (groups in 4 bits per layer at the usual ratios) repeats what the order says, for
readers.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from flexiq_jax.orders.arrangement import groups_per_block, shift_blocks
from flexiq_jax.orders.schedule import Schedule
from flexiq_jax.orders.space import Space
from flexiq_jax.runs import files, schemas

FORMAT = "flexiq_jax recipe"
VERSION = 2
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeLayer:
  """One layer of a recipe.

  Attributes:
    name: layer name.
    in_channels, out_channels, macs: facts by which a recipe is checked against a model.
    x_scale: activation scale, real value of one 8-bit step.
    signed: whether activation codes are signed.
    groups: channel groups, each a tuple of feature channels; empty for a layer that stays 8-bit.
    x_shift: activation extraction shift of each group; the same within a shift block.
    x_mean: mean 8-bit activation code of each feature channel.
    low_mean: the same, lowered to 4 bits and shifted back.
  """

  name: str
  in_channels: int
  out_channels: int
  macs: int
  x_scale: float
  signed: bool
  groups: tuple[tuple[int, ...], ...] = ()
  x_shift: tuple[int, ...] = ()
  x_mean: tuple[float, ...] = ()
  low_mean: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A model's quantization and schedule.

  Attributes:
    model: name of the model it was made for.
    method: how the order was found (`greedy`, ...).
    seed: of calibration and selection.
    settings: plain values of the range and grouping settings.
    layers: every quantized layer, in execution order.
    order: (layer name, group) pairs, first to go to 4 bits first.
    fingerprint: of the float weights (see `network.fingerprint`); "" is of unknown ones.
    input: shape `[1, ...]` and dtype of one example, None of a model with several inputs.
    drops: level -> percent of the calibration examples' predictions that are not the float model's.
    weights: name of the file beside the recipe that holds finetuned weights; "" where the weights
      are the float model's.
  """

  model: str
  method: str
  seed: int
  settings: Mapping[str, Any]
  layers: tuple[RecipeLayer, ...]
  order: tuple[tuple[str, int], ...]
  fingerprint: str = ""
  input: tuple[tuple[int, ...], str] | None = None
  drops: Mapping[float, float] = dataclasses.field(default_factory=dict)
  weights: str = ""

  def __repr__(self) -> str:
    return f"Recipe({self.model!r}, {self.method}, {len(self.layers)} layers)"

  def schedule(self) -> Schedule:
    """The schedule over this recipe's groups."""
    chosen = [layer for layer in self.layers if layer.groups]
    space = Space.create(
      [layer.name for layer in chosen],
      [[len(g) for g in layer.groups] for layer in chosen],
      [layer.macs // layer.in_channels for layer in chosen],
    )
    starts = dict(zip(space.names, np.cumsum((0, *space.sizes)).tolist(), strict=False))
    return Schedule(space, np.array([starts[name] + group for name, group in self.order]))


def save(path: str | os.PathLike, recipe: Recipe) -> None:
  """Writes a recipe as JSON, all of it or nothing.

  Raises:
    ValueError: its order is not one of its groups, or does not go with their shift blocks.
  """
  files.write_text(path, dump(recipe))


def dump(recipe: Recipe) -> str:
  """A recipe as JSON text.

  Raises:
    ValueError: as `save`.
  """
  schedule = recipe.schedule()
  _check_blocks(recipe)
  document = {
    "format": FORMAT,
    "version": VERSION,
    "model": recipe.model,
    "method": recipe.method,
    "seed": recipe.seed,
    "fingerprint": recipe.fingerprint,
    "input": recipe.input,
    **({"weights": recipe.weights} if recipe.weights else {}),
    "settings": dict(recipe.settings),
    "drops": {f"{level:g}": drop for level, drop in recipe.drops.items()},
    "levels": {f"{r:.2f}": schedule.boundaries(r) for r in LEVELS},
    "layers": [dataclasses.asdict(layer) for layer in recipe.layers],
    "order": [f"{name}#{group}" for name, group in recipe.order],
  }
  return _dump(document)


def load(path: str | os.PathLike) -> Recipe:
  """Reads a recipe.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a recipe, of another version, or inconsistent in itself.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"recipe: {path} does not exist")
  try:
    document = json.loads(path.read_text(), object_pairs_hook=_object)
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"recipe: {path} is not JSON ({error})") from None
  except ValueError as error:
    raise ValueError(f"recipe: {path} is damaged: {error}") from None
  if not isinstance(document, dict) or document.get("format") != FORMAT:
    raise ValueError(f"recipe: {path} is not a recipe (its `format` is not {FORMAT!r})")
  if document.get("version") != VERSION:
    raise ValueError(
      f"recipe: {path} has version {document.get('version')!r}; this release reads {VERSION}"
    )
  try:
    read = schemas.convert(document, _Document)
    recipe = Recipe(
      model=read.model,
      method=read.method,
      seed=read.seed,
      settings=read.settings,
      weights=read.weights,
      layers=tuple(RecipeLayer(**msgspec.structs.asdict(layer)) for layer in read.layers),
      order=tuple(_group(entry) for entry in read.order),
      fingerprint=read.fingerprint,
      input=read.input,
      drops={float(level): drop for level, drop in read.drops.items()},
    )
    _check(recipe)
  except KeyError as error:
    raise ValueError(f"recipe: {path} is damaged: it lacks {error}") from None
  except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
    raise ValueError(f"recipe: {path} is damaged: {error}") from None
  return recipe


def require_fit(recipe: Recipe, layers: Sequence[Any]) -> None:
  """Checks that a recipe belongs to a model.

  Args:
    recipe: the recipe.
    layers: `graph.Layer`s of the model (name, in_channels, out_channels and macs are read).

  Raises:
    ValueError: naming the first difference.
  """
  made = {layer.name: layer for layer in recipe.layers}
  have = {layer.name: layer for layer in layers}
  missing = [name for name in have if name not in made]
  surplus = [name for name in made if name not in have]
  if missing or surplus:
    raise ValueError(
      f"recipe: made for {recipe.model!r} with {len(made)} layers, the model has {len(have)}; "
      + "; ".join(
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("not in the recipe:", missing), ("not in the model:", surplus))
        if names
      )
    )
  for name, layer in have.items():
    for field in ("in_channels", "out_channels", "macs"):
      if getattr(made[name], field) != getattr(layer, field):
        raise ValueError(
          f"recipe: layer {name} has {field} {getattr(made[name], field)} in the recipe and "
          f"{getattr(layer, field)} in the model; was it made for another variant or input size?"
        )


_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class _Layer(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """`RecipeLayer` in the file."""

  name: Annotated[str, msgspec.Meta(min_length=1)]
  in_channels: _Size
  out_channels: _Size
  macs: Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
  x_scale: float
  signed: bool
  groups: tuple[tuple[_Count, ...], ...]
  x_shift: tuple[int, ...]
  x_mean: tuple[float, ...]
  low_mean: tuple[float, ...]


class _Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """The file."""

  format: str
  version: int
  model: str
  method: Annotated[str, msgspec.Meta(pattern=r"^\w[\w+.-]*$")]
  seed: _Count
  fingerprint: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
  input: tuple[tuple[_Size, ...], str] | None
  weights: Annotated[str, msgspec.Meta(pattern=r"^(\w[\w.-]*)?$")] = ""
  settings: dict[str, Any]
  drops: dict[Annotated[str, msgspec.Meta(pattern=r"^(0(\.\d{1,9})?|1)$")], _Percent]
  levels: dict[str, dict[str, int]] = {}
  layers: tuple[_Layer, ...]
  order: tuple[str, ...]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object, each key of which stands in it once."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"key {max(keys, key=keys.count)!r} stands more than once in an object")
  return found


def _group(entry: str) -> tuple[str, int]:
  """A layer's name and the number of its group, from `name#3`."""
  found = re.fullmatch(r"(.+)#([0-9]{1,9})", entry)
  if not found:
    raise ValueError(f"order: {entry!r:.80} is not NAME#GROUP")
  return found[1], int(found[2])


def _check(recipe: Recipe) -> None:
  for part in ("ranges", "groups"):
    if not isinstance(recipe.settings[part], Mapping):
      raise ValueError(f"settings: {part} is no object")
  if not isinstance(recipe.settings.get("dynamic", False), bool):
    raise ValueError("settings: dynamic is neither true nor false")
  names = [layer.name for layer in recipe.layers]
  if len(set(names)) < len(names):
    raise ValueError(f"layer {max(names, key=names.count)} is there more than once")
  grouped = {layer.name for layer in recipe.layers if layer.groups}
  for name, group in recipe.order:
    if name not in grouped:
      raise ValueError(f"order: '{name}#{group}' is of no layer that has groups")
  for layer in recipe.layers:
    if not 0 < layer.x_scale < math.inf:
      raise ValueError(f"layer {layer.name}: x_scale {layer.x_scale} is not positive and finite")
    if not layer.groups:
      continue
    # Lengths first: a file may ask for more channels than memory holds.
    channels = sorted(c for g in layer.groups for c in g)
    if len(channels) != layer.in_channels or channels != list(range(layer.in_channels)):
      raise ValueError(f"layer {layer.name}: groups do not hold each channel once")
    if len(layer.x_shift) != len(layer.groups) or not all(0 <= e <= 4 for e in layer.x_shift):
      raise ValueError(f"layer {layer.name}: x_shift needs one value in 0..4 for each group")
    for field in ("x_mean", "low_mean"):
      values = getattr(layer, field)
      if len(values) != layer.in_channels or not all(map(math.isfinite, values)):
        raise ValueError(f"layer {layer.name}: {field} needs {layer.in_channels} finite values")
  _check_blocks(recipe)


def _check_blocks(recipe: Recipe) -> None:
  """Groups that share a shift block, by the order and the settings, have to share their shift."""
  settings = recipe.settings["groups"]
  block = settings.get("shift_block", 0)
  layouts = recipe.schedule().layer_order()
  if not block:
    return
  if not (isinstance(block, int) and block > 0):
    raise ValueError(f"settings: groups: shift_block {block!r} is not a number of channels")
  for layer in recipe.layers:
    if not layer.groups:
      continue
    blocks = shift_blocks(layouts[layer.name], groups_per_block(layer.groups, block))
    first = np.unique(blocks, return_index=True)[1]
    shifts = np.array(layer.x_shift)
    if bad := np.flatnonzero(shifts != shifts[first[blocks]]).tolist():
      raise ValueError(
        f"layer {layer.name}: x_shift of groups {first[blocks[bad[0]]]} and {bad[0]} differ, which "
        f"are in one shift block of {block} channels by the order"
      )


def _dump(document: Mapping[str, Any]) -> str:
  """JSON with one layer, one level and ten order entries a line."""
  lines = []
  for key, value in document.items():
    if key in ("layers", "order", "levels"):
      if key == "levels":
        rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
      elif key == "layers":
        rows = [json.dumps(v) for v in value]
      else:
        rows = [json.dumps(value[i : i + 10])[1:-1] for i in range(0, len(value), 10)]
      opening, closing = "{}" if key == "levels" else "[]"
      body = ",\n".join(f"    {row}" for row in rows)
      lines.append(f'  "{key}": {opening}\n{body}\n  {closing}')
    else:
      lines.append(f'  "{key}": {json.dumps(value)}')
  return "{\n" + ",\n".join(lines) + "\n}\n"
