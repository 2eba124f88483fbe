"""The float model whose logits training wants, where the config names another than its own."""

from typing import Any

import numpy as np
from flax import nnx

from experiments.shared import pretrained
from experiments.shared.checks import Settings, field, model_args
from flexiq_jax import data, models

WEIGHTS = "a safetensors file, hf:owner/repository or random"


def load(config, settings: Settings, module: Any) -> tuple[models.Apply, Any] | None:
  """Reads the teacher that a config names.

  Args:
    config: the config; its section `teacher` is read.
    settings: its values, checked.
    module: the model that is trained, abstract.

  Returns:
    A function `(params, images of the config's preprocessing) -> logits` with its parameters; None
    where the config names no teacher.

  Raises:
    ValueError: it is unknown, takes other images, tells other classes apart, or its weights are
      missing or do not fit; names the field.
  """
  part = config.teacher
  if not part.model:
    if part.weights or part.model_args:
      raise ValueError("config.teacher.model: empty, but its weights or model_args are not")
    return None
  with field("config.teacher.model"):
    spec = models.get(part.model)
  with field("config.teacher.model_args"):
    args = model_args(part.model_args, spec)
    build = lambda: models.create(part.model, seed=config.seed, dtype=config.dtype, **args)
    teacher: Any = nnx.eval_shape(build)
  for name in ("input_shape", "num_classes"):
    ours, theirs = getattr(module, name), getattr(teacher, name)
    if theirs != ours:
      raise ValueError(
        f"config.teacher.model: {part.model!r} has {name} {theirs}; {ours} is accepted, as "
        f"{config.model!r} has"
      )
  if not part.weights:
    raise ValueError(f"config.teacher.weights: empty; give {WEIGHTS}")
  if part.weights == "random":
    apply, params = models.functional(build())
  else:
    apply, _ = models.functional(teacher)
    params = pretrained.load(part, "config.teacher", teacher)
  return _renormalised(apply, settings.preprocess, spec), params


def _renormalised(
  apply: models.Apply, given: data.Preprocess, wanted: models.ModelSpec
) -> models.Apply:
  """A model that takes images which were normalised for another."""
  if (given.mean, given.std) == (tuple(wanted.mean), tuple(wanted.std)):
    return apply
  std = np.asarray(wanted.std)
  factor = (np.asarray(given.std) / std).astype(np.float32)
  shift = ((np.asarray(given.mean) - np.asarray(wanted.mean)) / std).astype(np.float32)
  return lambda params, x: apply(params, x * factor + shift)
