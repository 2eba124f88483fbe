r"""Finetuning of all parameters and scales at once, so that one set of weights serves all ratios.

Every step computes the model at two ratios, an end of the range and one drawn from it ("sandwich"),
and adds up the distances of their logits from the float model's; the masks are those of the model's
own order, so that every prefix of it stays good. At 100 % the distance is many times that at 0 %;
where the 8-bit model must not give way, each is divided by what it was before the training. Batch
norm is folded, and what was folded is trained as a weight and a bias. The 8-bit codes are those of
the weights at every step, the 4-bit codes lie inside them (`quant.straight`). Extraction shifts and
mean codes stay between two fits.

A run is a function of the model, the examples and the seed; see `training.loop` for what a killed
one does. Of several devices each takes a part of every batch. docs/flexiq.md, step H.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexiq_jax import models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.finetuning.examples import Batches, Examples
from flexiq_jax.finetuning.objective import distances, objective, parts_of, scales_of, targets
from flexiq_jax.finetuning.reconstruction import reconstruct
from flexiq_jax.finetuning.refit import refit
from flexiq_jax.finetuning.settings import FinetuneSettings, ReconstructionSettings
from flexiq_jax.graph import Layer
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings, calibration, rules, straight
from flexiq_jax.runs import files
from flexiq_jax.training import loop

Array = Any


class Options(TypedDict, total=False):
  """How a training runs, of both kinds.

  Attributes:
    seed: of the batches, the ratios and `Examples.prepare`; 0 if missing.
    checkpoint_dir: folder of checkpoints; one of the same run is gone on with.
    run: what else has to be equal for a checkpoint to be of the same run.
    progress: called with each entry of the log: epoch, step, loss, and `loss_R`, the mean distance
      at each anchor R, and at drawn ratios (`loss_drawn`).
    mesh: devices that share every batch; one axis.
  """

  seed: int
  checkpoint_dir: str | os.PathLike[str] | None
  run: Mapping[str, Any]
  progress: Callable[[dict[str, Any]], None] | None
  mesh: Mesh | None


def finetune(
  model: AdaptiveModel,
  examples: Examples,
  batches: Iterable[Array],
  settings: FinetuneSettings,
  *,
  teacher: Network | None = None,
  passes: Callable[[str, int], None] | None = None,
  **options: Unpack[Options],
) -> tuple[AdaptiveModel, list[dict[str, Any]]]:
  """Finetunes a model over all ratios.

  Args:
    model: where it starts; static shifts.
    examples: what it is trained on.
    batches: calibration inputs `[B, ...]`, on which shifts and mean codes are fitted again.
    settings: of the training.
    teacher: the float model whose logits are wanted, for the same inputs; that of `model` if None.
    passes: where it begins with a reconstruction, that one's `progress`.
    **options: see `Options`.

  Returns:
    The model with its new weights, scales and shifts, in the same order; the log.

  Raises:
    ValueError: an argument does not fit; loop.DivergedError: the loss is not finite.
  """
  if model.dynamic:
    raise ValueError("model: dynamic shifts are chosen at run time; finetune a static model")
  network, batches = model.network, list(batches)
  teacher = teacher or network
  _check(examples, settings, network, teacher, options.get("mesh"))
  if settings.reconstruct:
    model, _ = reconstruct(model, batches, ReconstructionSettings(), passes)
    network = model.network
  run_codes = calibration.compiled(calibration.code_pass(network.apply, network.platform))
  fit = lambda params, scales: refit(model, params, scales, batches, run_codes)
  unit = distances(teacher, model, examples, settings) if settings.balance else None
  state, log = _train(
    *(network, model.model, model.cuts, model.settings, model.schedule.masks, examples, settings),
    fit=fit,
    teacher=teacher,
    unit=unit,
    **options,
  )
  return fit(*state), log


def finetune_uniform(
  network: Network,
  model: rules.QModel,
  examples: Examples,
  settings: FinetuneSettings,
  *,
  teacher: Network | None = None,
  **options: Unpack[Options],
) -> tuple[tuple[Network, dict[str, rules.QLayer]], list[dict[str, Any]]]:
  """Finetunes a uniformly quantized model with the same loss: what FlexiQ is compared with.

  Args:
    network: the float model.
    model: its layers at their widths.
    examples: what it is trained on.
    settings: of the training; a step computes one model instead of two ratios.
    teacher: the float model whose logits are wanted, for the same inputs; `network` if None.
    **options: see `Options`.

  Returns:
    The float model with its new parameters and its quantized layers; the log.
  """
  teacher = teacher or network
  _check(examples, settings, network, teacher, options.get("mesh"))
  plain = {name: dataclasses.replace(q, low=None) for name, q in model.items()}
  (params, scales), log = _train(
    *(network, plain, {}, LowSettings(), None, examples, settings),
    teacher=teacher,
    **options,
  )
  network = network.with_params(params)
  layers = {
    layer.name: straight.quantize_layer(
      *(layer, network.weights[layer.name], scales[layer.name]),
      *(plain[layer.name].signed, plain[layer.name].bits),
    )
    for layer in network.layers
  }
  return (network, layers), log


def _train(
  network: Network,
  model: rules.QModel,
  cuts: Mapping[str, Any],
  low: LowSettings,
  masks: Callable[[Array], Mapping[str, Array]] | None,
  examples: Examples,
  settings: FinetuneSettings,
  *,
  teacher: Network,
  seed: int = 0,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  run: Mapping[str, Any] | None = None,
  progress: Callable[[dict[str, Any]], None] | None = None,
  mesh: Mesh | None = None,
  fit: Callable[[Any, Any], AdaptiveModel] | None = None,
  unit: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[tuple[Any, dict[str, straight.Scales]], list[dict[str, Any]]]:
  layers = network.layers
  kept = {q.name: straight.kept(q, model[q.name], cuts.get(q.name), low) for q in layers}
  start = {name: straight.Scales(q.x_scale, q.w_scale) for name, q in model.items()}
  params = {"params": network.params, "log_scales": jax.tree.map(jnp.zeros_like, start)}
  first = params
  whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  shared = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if whole is not None:
    params, kept = jax.device_put((params, kept), whole)

  def before(epoch: int, state: loop.State) -> loop.State:
    done = (epoch - 1) * settings.every
    if fit is None or not settings.refit or not done or done % settings.refit:
      return state
    found = fit(state.params["params"], scales_of(start, state.params["log_scales"]))
    fresh = {
      q.name: straight.kept(q, found.model[q.name], found.cuts.get(q.name), low) for q in layers
    }
    fresh = fresh if whole is None else jax.device_put(fresh, whole)
    return dataclasses.replace(state, rest=fresh)

  def entry(epoch: loop.Epoch, state: loop.State) -> dict[str, Any]:
    del state
    totals = dict(epoch.totals)
    counts = {k.removeprefix("count_"): totals.pop(k) for k in [*totals] if k.startswith("count_")}
    found = {k: v / max(counts.get(k.removeprefix("loss_"), 1.0), 1.0) for k, v in totals.items()}
    return {"epoch": epoch.epoch, "step": epoch.step, "loss": epoch.loss, **found}

  given = dataclasses.asdict(settings) | {"seed": seed}
  del given["interpolate"]  # the training is the same

  state, log = loop.train(
    objective(network, start, masks, settings, unit),
    params,
    kept,
    make_optimizer(
      settings, layers, {k: q.w_scale * 2.0 ** (q.bits - 8) for k, q in model.items()}
    ),
    Batches(examples, settings.batch_size, settings.every, seed, shared),
    epochs=settings.steps // settings.every,
    seed=seed,
    entry=entry,
    run=files.to_plain({"finetune": given, **(run or {})}),
    checkpoint_dir=checkpoint_dir,
    progress=progress,
    before=before,
    prepare=targets(teacher, examples.prepare, settings.output_weight > 0),
    parts=parts_of(settings, masks),
  )
  end, begin = jax.device_get((state.params, first))
  trained: Any = optax.incremental_update(end, begin, settings.interpolate)
  return (trained["params"], scales_of(start, trained["log_scales"])), log


def make_optimizer(
  settings: FinetuneSettings, layers: Iterable[Layer], steps: Mapping[str, Array]
) -> optax.GradientTransformation:
  """Adam, with a rate for weights, one for other parameters, and one for logarithms of scales.

  Adam moves every number equally far. Folded batch norm leaves weights whose sizes differ by
  factors of thousands from channel to channel: what is little to one destroys the other. So weights
  move in steps of their own output channel.

  Args:
    settings: of the training.
    layers: of the network.
    steps: layer name -> 8-bit steps of its weights, float32 `[N]`.
  """
  weights = {layer.param: layer for layer in layers}

  def rate(path: str, move: Array) -> Array:
    if path not in weights:
      return settings.other_learning_rate * move
    layer = weights[path]
    return settings.learning_rate * straight.per_output(layer, steps[layer.name]) * move

  def rated(updates: Any, params: Any) -> Any:
    del params
    moves = {path: rate(path, move) for path, move in models.flatten(updates["params"]).items()}
    scales = jax.tree.map(lambda m: settings.scale_learning_rate * m, updates["log_scales"])
    return {"params": models.unflatten(moves), "log_scales": scales}

  course = optax.warmup_cosine_decay_schedule(
    0.0 if settings.warmup else 1.0, 1.0, settings.warmup, settings.steps
  )
  return optax.chain(
    optax.scale_by_adam(), optax.stateless(rated), optax.scale_by_learning_rate(course)
  )


def _check(
  examples: Examples,
  settings: FinetuneSettings,
  network: Network,
  teacher: Network,
  mesh: Mesh | None,
) -> None:
  if teacher is not network:
    _check_teacher(network, teacher, settings)
  n = len(examples.inputs)
  if not n:
    raise ValueError("examples: none; finetuning needs training examples")
  if settings.batch_size > n:
    raise ValueError(f"batch_size: {settings.batch_size}; 1..{n} is accepted, the examples given")
  if settings.label_weight and examples.labels is None:
    raise ValueError(
      f"label_weight: {settings.label_weight}, but the examples have no labels; give labels, or 0"
    )
  if examples.labels is not None and len(examples.labels) != n:
    raise ValueError(f"labels: {len(examples.labels)} for {n} examples")
  if mesh is not None and settings.batch_size % mesh.size:
    raise ValueError(
      f"batch_size: {settings.batch_size} does not divide over {mesh.size} devices; a multiple of "
      "their number is accepted"
    )


def _check_teacher(network: Network, teacher: Network, settings: FinetuneSettings) -> None:
  """Refuses a teacher that does not answer the model's inputs with as many logits."""
  ours = jax.eval_shape(network.apply, network.params, network.example).shape
  try:
    theirs = jax.eval_shape(teacher.apply, teacher.params, network.example).shape
  except (TypeError, ValueError) as error:
    taken = jax.tree.map(lambda x: x.shape, network.example)
    raise ValueError(f"teacher: cannot take the model's inputs, {taken}: {error}") from error
  if theirs != ours:
    raise ValueError(f"teacher: its logits are {theirs}, those of the model {ours}")
  if settings.output_weight:
    sizes = lambda net: [(layer.name, layer.out_channels) for layer in net.layers]
    if sizes(network) != sizes(teacher):
      raise ValueError(
        f"output_weight: {settings.output_weight}, but the teacher has other layers; 0 is accepted"
      )
