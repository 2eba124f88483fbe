"""The loss of one ratio of a step: how far logits are from those of a float model."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexiq_jax import graph
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.finetuning.examples import Batches, Examples, Prepare
from flexiq_jax.finetuning.settings import FinetuneSettings
from flexiq_jax.network import Network
from flexiq_jax.orders import LEVELS
from flexiq_jax.quant import exact, rules, straight
from flexiq_jax.search import DISTANCES
from flexiq_jax.training import loop

Array = Any
# What the random numbers of a step are folded with.
_PREPARE, _RATIO = 0, 1
# Examples on which distances are measured before the training.
_MEASURED = 64


def distances(
  teacher: Network, model: AdaptiveModel, examples: Examples, settings: FinetuneSettings
) -> tuple[np.ndarray, np.ndarray]:
  """How far a model's logits are from the teacher's, by ratio.

  Args:
    teacher: the float model whose logits are wanted.
    model: which is finetuned.
    examples: what it is trained on; about `_MEASURED` of them are looked at.
    settings: of the training.

  Returns:
    Ratios `[R]`, ascending from 0 to 1, and the mean distance at each, float32 `[R]`, above 0.
  """
  prepare, apart = jax.jit(targets(teacher, examples.prepare)), jax.jit(DISTANCES[settings.loss])
  count = max(1, _MEASURED // settings.batch_size)
  data = Batches(examples, settings.batch_size, count, seed=0, sharding=None)
  found = np.zeros(len(LEVELS))
  for number, batch in enumerate(data.epoch(1)):
    x, target, *_ = prepare(jax.random.key(number), batch)
    found += [float(apart(model(x, ratio), target).mean()) / count for ratio in LEVELS]
  least = max(1e-3 * found.max(), 1e-12)
  return np.asarray(LEVELS, np.float32), np.maximum(found, least).astype(np.float32)


def objective(
  network: Network,
  start: Mapping[str, straight.Scales],
  masks: Callable[[Array], Mapping[str, Array]] | None,
  settings: FinetuneSettings,
  unit: tuple[np.ndarray, np.ndarray] | None = None,
) -> loop.Loss:
  """The loss at one ratio of a step: the distance from the teacher's logits.

  A step's parts (`parts_of`) are its ratios; batches are those of `targets`.

  Args:
    network: the float model that is trained.
    start: layer name -> scales, which the trained logarithms multiply.
    masks: ratio -> layer name -> bool `[J]`; None for a model that knows no ratio.
    settings: of the training.
    unit: what distances are measured by, as `distances` gives it; between its ratios a line.
  """
  distance = DISTANCES[settings.loss]

  def loss(trained, kept, key, batch):
    part, (x, target, outputs, labels) = batch if parts_of(settings, masks) > 1 else (0, batch)
    metrics, (ratio, anchor) = {}, _ratio(key, part, settings)
    chosen = masks(ratio) if masks else {}
    scales = scales_of(start, trained["log_scales"])
    rule = straight.finetune_rule(kept, scales, chosen, network.platform)
    errors: dict[str, Array] = {}
    if settings.output_weight:
      rule = _compared(rule, outputs, errors)
    z = graph.with_rule(network.apply, rule)(trained["params"], x)
    value = found = distance(z, target).mean()
    if unit:
      value = found / jnp.interp(ratio, *unit) ** settings.balance
    if settings.output_weight:
      value += settings.output_weight * sum(errors.values()) / len(errors)
    if settings.label_weight:
      entropy = optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
      value += settings.label_weight * entropy
    if masks:
      for i, name in enumerate((*(f"{a:g}" for a in settings.anchors), "drawn")):
        metrics[f"loss_{name}"] = jnp.where(anchor == i, found, 0)
        metrics[f"count_{name}"] = jnp.where(anchor == i, 1.0, 0.0)
    return value, (kept, metrics)

  return loss


def targets(teacher: Network, prepare: Prepare, outputs: bool = False) -> loop.Prepare:
  """`(key, (examples, labels)) -> (inputs, teacher's logits, outputs of its layers, labels)`.

  Outputs are layer name -> the teacher's product, before a bias; none unless asked for.
  """

  def run(key, batch):
    examples, labels = batch
    x = prepare(jax.random.fold_in(key, _PREPARE), examples)
    found: dict[str, Array] = {}

    def real(layer, x, w, contract):
      y = exact.real_product(layer, x, w, contract, teacher.platform)
      if outputs:
        found[layer.name] = y
      return y

    z = graph.with_rule(teacher.apply, real)(teacher.params, x)
    return x, z, found, labels

  return run


def _compared(
  rule: rules.Rule, outputs: Mapping[str, Array], errors: dict[str, Array]
) -> rules.Rule:
  """A rule that notes each layer's squared error, relative to the squares of its outputs."""

  def run(layer, x, w, contract):
    y = rule(layer, x, w, contract)
    wanted = outputs[layer.name].astype(jnp.float32)
    error = jnp.square(y.astype(jnp.float32) - wanted).mean()
    errors[layer.name] = error / jnp.maximum(jnp.square(wanted).mean(), jnp.finfo(jnp.float32).tiny)
    return y

  return run


def parts_of(settings: FinetuneSettings, masks: Any) -> int:
  """How many ratios a step computes, one after the other: an anchor and a drawn one."""
  return 2 if masks and settings.anchors else 1


def _ratio(key: jax.Array, part: Array, settings: FinetuneSettings) -> tuple[Array, Array]:
  """The 4-bit ratio of a part of a step, and its number among the anchors (after them: drawn)."""
  keys = jax.random.split(jax.random.fold_in(key, _RATIO))
  drawn = jax.random.uniform(keys[0])
  if settings.ratios:
    drawn = jax.random.choice(keys[0], jnp.asarray(settings.ratios, jnp.float32))
  count = len(settings.anchors)
  if not count:
    return drawn, jnp.int32(0)
  anchor = jax.random.randint(keys[1], (), 0, count)
  ratio = jnp.asarray(settings.anchors, jnp.float32)[anchor]
  return jnp.where(part == 0, ratio, drawn), jnp.where(part == 0, anchor, count)


@jax.jit
def scales_of(start: Mapping[str, straight.Scales], log_scales: Any) -> dict[str, straight.Scales]:
  """Scales of all layers: those of the start times what was trained."""
  return jax.tree.map(lambda s, t: s * jnp.exp(t), start, log_scales)
