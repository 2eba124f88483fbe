"""The short way from a float model to an adaptive one; `deployed.py` has the way on from there.

    model = quantize(net_or_apply, params, batches)
    model = improve(model)
    logits = model(x, 0.5)

Its steps are objects of their own, for those who keep what lies between them: `Network`,
`Calibrated`, `Grouped`, an order from `orders` or `search`, `AdaptiveModel`.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flexiq_jax import accuracy, adaptive, finetuning, inputs, orders, search
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.calibrated import Grouped, calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import LEVELS, recipes
from flexiq_jax.quant import LowSettings, PassListener, RangeSettings, selectable
from flexiq_jax.runs.interruption import quiet
from flexiq_jax.runs.progress import PassProgress
from flexiq_jax.search import SearchSettings

Array = Any


@quiet
def quantize(
  net: Any,
  params: Any = None,
  batches: Any = None,
  *,
  names: Sequence[str] | str | None = None,
  ranges: RangeSettings | None = None,
  settings: LowSettings | None = None,
  dynamic: bool = False,
  progress: bool = True,
) -> AdaptiveModel:
  """Calibrates a float model, scores its channel groups and orders them greedily.

      quantize(apply, params, batches)    quantize(nnx_module, batches)

  Args:
    net: an NNX module, a Linen module, a pure function `(params, x) -> y`, or a `Network`.
    params: its parameters; an NNX module and a network have their own.
    batches: calibration inputs from training data: an array `[n, ...]`, or an iterable of batches
      `[B, ...]`, read once and kept. Labels beside them (`(x, labels)`) are not used.
    names: layers that may go to 4 bits; all but the first, the last and depthwise ones if None.
    ranges: how clipping ranges are found.
    settings: how channels are grouped and lowered.
    dynamic: choose activation shifts at run time.
    progress: whether to show the passes, on standard error.

  Raises:
    ValueError: something else was given; the message says what would be accepted.
  """
  if batches is None and isinstance(net, nnx.Module | Network):
    params, batches = None, params
  if isinstance(net, Network) and params is not None:
    raise ValueError("params: a Network has its own; quantize(network, batches) is accepted")
  given = None if isinstance(net, Network) else inputs.as_function(net, params)
  examples = inputs.batches_of(batches)
  network = net if given is None else Network(*given, examples[0][:1])
  chosen = _chosen(network, names)
  with _passes(examples, progress) as listener:
    calibrated = calibrate(network, examples, ranges, listener)
    grouped = calibrated.group(chosen, settings or LowSettings())
    order = orders.greedy(grouped.space, grouped.scores(progress=listener))
    return _finished(grouped, order, LEVELS, dynamic=dynamic)


@quiet
def improve(
  model: AdaptiveModel,
  batches: Any = None,
  *,
  method: str | None = None,
  minutes: float | None = None,
  distance: str | search.Distance | None = None,
  loss: search.Distance | None = None,
  settings: SearchSettings | None = None,
  seed: int = 0,
  progress: bool = True,
) -> AdaptiveModel:
  """Searches a better order for a model, on all devices.

  Args:
    model: the model. One that was made from a recipe is calibrated anew, with the batches.
    batches: search examples, as for `quantize`; those the model was calibrated on if None. With
      `loss`, `(x, labels)`, or an iterable of such pairs.
    method: in place of the settings': `gram`, `evolution` or `greedy` (no search).
    minutes: after which the search takes what it has, in place of the settings'.
    distance: from the 8-bit model's logits, in place of the settings': `l2`, `kl`, or a function
      `(logits [B, ..., K], logits8 [B, ..., K]) -> [B]`.
    loss: a function `(logits [B, ..., K], labels [B, ...]) -> [B]` in place of a distance.
    settings: of the search.
    seed: of everything random in it.
    progress: whether to show how far it is, on standard error.

  Returns:
    The model with the order that was found; at no level is it worse on the search examples than the
    model given, or than the greedy order.

  Raises:
    ValueError: as `search.search`; or batches or labels are missing.
  """
  settings = settings or SearchSettings()
  changes: dict[str, Any] = {"method": method, "max_minutes": minutes}
  changes["distance"] = None if callable(distance) else distance
  changes = {name: value for name, value in changes.items() if value is not None}
  settings = dataclasses.replace(settings, **changes)
  if loss is not None and distance is not None:
    raise ValueError("distance, loss: both given; one of them is accepted")
  found = None if batches is None else list(inputs.pairs(batches))
  labels = [y for _, y in found or ()]
  if loss is not None and (not labels or labels[0] is None):
    raise ValueError("batches: a loss wants labels; give (x, labels), or an iterable of such pairs")
  grouped, examples = model.grouped, [x for x, _ in found or ()]
  tuned = model.w_scales is not None
  if tuned and model.settings.shift_block:
    raise ValueError(
      "model: it is finetuned, and its shift blocks go with the order it has; search, then finetune"
    )
  with _passes(_required(examples or _kept(model)), progress) as listener:
    if grouped is None and not tuned:
      calibrated = calibrate(model.network, examples, model.ranges, listener)
      grouped = calibrated.group(model.schedule.space.names, model.settings)
    examples = examples or [np.asarray(x) for x in grouped.calibrated.batches]
    if tuned:  # with the scales and shifts that it has
      network, layers, space = model.network, model.model, model.schedule.space
      scores = adaptive.scores(network, layers, space, examples, listener)
    else:
      network, layers, space = grouped.calibrated.network, grouped.model, grouped.space
      scores = grouped.scores(progress=listener)
    # The order of other groups than these says nothing.
    alike = space.sizes == model.schedule.space.sizes
    result = search.search(
      *(network, layers, space, scores),
      np.concatenate(examples),
      settings,
      seed=seed,
      distance=loss if loss is not None else distance if callable(distance) else None,
      labels=None if loss is None else np.concatenate([np.asarray(y) for y in labels]),
      seeds=[model.schedule.order] if alike else (),
      show=(lambda line: print(line, file=sys.stderr, flush=True)) if progress else None,
      mesh=search.population_mesh(),
    )
    levels = {*LEVELS, *settings.levels}
    how = {"dynamic": model.dynamic, "method": settings.method, "seed": seed}
    if tuned:
      schedule = orders.Schedule(space, result.order)
      return _measured(dataclasses.replace(model, schedule=schedule, **how), examples)
    return _finished(grouped, result.order, levels, **how)


@quiet
def reconstruct(
  model: AdaptiveModel, batches: Any = None, *, progress: bool = True
) -> AdaptiveModel:
  """Rounds a model's weights by the outputs of their layers, without training.

  Args:
    model: the model; order, groups and scales stay. `finetune` begins with this by itself; given
      the model that comes out here, it would take the rounded weights for the float model's.
    batches: calibration inputs, as for `quantize`; those it was calibrated on if None.
    progress: whether to show how far it is, on standard error.

  Returns:
    The model with its new weights; `save` writes them beside the recipe.

  Raises:
    ValueError: as `finetuning.reconstruct`; or examples are missing.
  """
  examples = _required(inputs.batches_of(batches) if batches is not None else _kept(model))
  with _passes(examples, progress) as listener:
    settings = finetuning.ReconstructionSettings()
    found, _ = finetuning.reconstruct(model, examples, settings, listener)
  return _measured(found, examples)


@quiet
def finetune(
  model: AdaptiveModel,
  batches: Any = None,
  *,
  settings: finetuning.FinetuneSettings | None = None,
  prepare: finetuning.Prepare | None = None,
  teacher: Any = None,
  seed: int = 0,
  checkpoint_dir: str | os.PathLike | None = None,
  progress: bool = True,
) -> AdaptiveModel:
  """Trains a model's weights and scales so that they serve all ratios (see `finetuning`).

  The float model is the teacher, so labels are not needed. A better one may take its place.

  Args:
    model: the model; its order and groups stay.
    batches: training examples, as for `quantize`; those it was calibrated on if None. With
      `settings.label_weight`, `(x, labels)`, or an iterable of such pairs.
    settings: of the training; by default a reconstruction, then 1,600 steps of 32 examples.
    prepare: makes the model's input of a batch of examples, `(key, x) -> x`, as augmentation does.
    teacher: another float model whose logits are wanted, for the same inputs: an NNX module, a
      `Network`, or a function `(params, x) -> y` or a Linen module with its parameters, as a pair.
    seed: of everything random in it.
    checkpoint_dir: folder of checkpoints; a run that was stopped goes on from there.
    progress: whether to show how far it is, on standard error.

  Returns:
    The model with its new weights; `save` writes them beside the recipe.

  Raises:
    ValueError: as `finetuning.finetune`; or examples or labels are missing.
  """
  settings = settings or finetuning.FinetuneSettings()
  calibration = _kept(model)
  given_pairs = inputs.pairs(batches) if batches is not None else ((x, None) for x in calibration)
  found = _required(list(given_pairs))
  examples = np.concatenate([np.asarray(x) for x, _ in found])
  labels = [y for _, y in found if y is not None]
  given = {} if prepare is None else {"prepare": prepare}
  calibration = calibration or [examples[:512]]
  other = None if teacher is None else _teacher(teacher, model.network)
  with _passes(calibration, progress) as listener:
    tuned, _ = finetuning.finetune(
      model,
      finetuning.Examples(
        examples, np.concatenate([np.asarray(y) for y in labels]) if labels else None, **given
      ),
      calibration,
      settings,
      teacher=other,
      passes=listener,
      seed=seed,
      checkpoint_dir=checkpoint_dir,
      run={} if other is None else {"teacher": other.fingerprint},
      progress=_steps if progress else None,
      mesh=finetuning.examples_mesh(settings.batch_size),
    )
  return _measured(tuned, calibration)


@quiet
def load(
  directory: str | os.PathLike,
  net: Any,
  params: Any = None,
  *,
  x: Any = None,
  other_weights: bool = False,
) -> AdaptiveModel:
  """Reads a model that `model.save` wrote, or the recipe of a run.

  Args:
    directory: the folder, or the path of a `recipe.json`.
    net: the float model, as for `quantize`.
    params: its parameters, as for `quantize`.
    x: an example input `[B, ...]`, array or shape; None takes the one that the recipe names.
    other_weights: whether the model may have other weights than those it was quantized with. Ranges
      and order are then those of the old ones.

  Raises:
    FileNotFoundError: there is no recipe.
    ValueError: it is damaged, or of another model or other weights.
  """
  path = Path(directory)
  path = path / "recipe.json" if path.is_dir() else path
  recipe = recipes.load(path)
  if isinstance(net, Network):
    network = net
  else:
    if x is None and recipe.input is None:
      raise ValueError("x: missing; the recipe does not say what the model takes")
    x = x if x is not None else jax.ShapeDtypeStruct(*recipe.input)  # type: ignore
    network = Network(*inputs.as_function(net, params), x)
  return adaptive.load(path, network, other_weights=other_weights)


def _teacher(given: Any, network: Network) -> Network:
  """A teacher as a network of the same inputs."""
  if isinstance(given, Network):
    return given
  net, params = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
  try:
    return Network(*inputs.as_function(net, params), network.example)
  except (TypeError, ValueError) as error:
    raise ValueError(f"teacher: {error}") from error


def _steps(entry: dict[str, Any]) -> None:
  """A line of finetuning's progress."""
  losses = [f"{value:.4g} at {k[5:]}" for k, value in entry.items() if k.startswith("loss_")]
  print(f"step {entry['step']}: distance {', '.join(losses)}", file=sys.stderr, flush=True)


def _chosen(network: Network, names: Sequence[str] | str | None) -> tuple[str, ...]:
  """The layers that may go to 4 bits."""
  if names is None:
    return selectable(network.layers)
  names = (names,) if isinstance(names, str) else tuple(names)
  if not names:
    raise ValueError(
      "names: empty; None takes all layers but the first, the last and depthwise ones"
    )
  return tuple(network.layer(name).name for name in names)


def _kept(model: AdaptiveModel) -> list[Array]:
  """The examples that a model was calibrated on; none where it was made from a recipe."""
  return [] if model.grouped is None else list(model.grouped.calibrated.batches)


def _required(examples: list[Any]) -> list[Any]:
  """Refuses to go on without examples."""
  if not examples:
    raise ValueError("batches: missing; a model that was made from a recipe keeps no examples")
  return examples


@contextlib.contextmanager
def _passes(batches: Sequence[Array], shown: bool) -> Iterator[PassListener | None]:
  """A display of the passes over batches, if wanted."""
  if not shown:
    yield None
    return
  with PassProgress(sum(map(len, batches)), stream=sys.stderr) as listener:
    yield listener


def _finished(
  grouped: Grouped, order: np.ndarray, levels: Iterable[float], **how: Any
) -> AdaptiveModel:
  """The model of an order, with what it does to the predictions on the calibration examples."""
  model = dataclasses.replace(grouped.ordered(order, levels), **how)
  return _measured(model, list(grouped.calibrated.batches))


def _measured(model: AdaptiveModel, batches: Sequence[Array]) -> AdaptiveModel:
  """A model with what it does to the predictions on some batches."""
  if not accuracy.has_logits(model, batches[0]):
    return model
  found = accuracy.measure(model, [(x, None) for x in batches], LEVELS)
  drops = {level: round(100 - value, 4) for level, value in found.values.items()}
  return dataclasses.replace(model, drops=drops)
