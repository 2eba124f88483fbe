"""Training of image classifiers from scratch: the embedded demo and CIFAR ResNets.

A user of the training loop: an NNX module, augmented images, cross-entropy with labels. The order
of the data and the held-out slice depend on the seed only, so a killed run goes on as if it had
never stopped (see loop.py).

Accuracy is watched on a held-out slice of the *training* split; the test split is never read here.
What the settings mean is in settings.py.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flexiq_jax.data import (
  MEMORY_BUDGET,
  Epochs,
  Preprocess,
  Source,
  batches,
  calibration_indices,
)
from flexiq_jax.training import loop
from flexiq_jax.training.settings import (
  TrainSettings,
  augment,
  learning_rate_schedule,
  make_optimizer,
)

_EVAL_BATCH = 256
# Settings that may change between the runs that share a checkpoint folder.
_FREE_SETTINGS = ("checkpoint_every",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochLog:
  """What one epoch gave.

  Attributes:
    epoch: 1 for the first.
    step: optimizer steps so far.
    learning_rate: at the last step.
    loss: mean over the epoch's augmented training images, while training.
    train_top1: their accuracy in percent, while training.
    held_out_top1: accuracy in percent on the held-out slice; None without one.
  """

  epoch: int
  step: int
  learning_rate: float
  loss: float
  train_top1: float
  held_out_top1: float | None


def fit(
  module: nnx.Module,
  source: Source,
  preprocess: Preprocess,
  *,
  settings: TrainSettings,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  progress: Callable[[EpochLog], None] | None = None,
  memory_budget: int = MEMORY_BUDGET,
) -> tuple[nnx.Module, list[EpochLog]]:
  """Trains a module.

  Args:
    module: maps float32 [B, H, W, C] to logits [B, K]. Its `nnx.Param`s are trained; its other
      state (batch statistics, dropout keys) is carried along.
    source: the training split.
    preprocess: the model's evaluation preprocessing; augmentation comes between its crop and its
      normalisation.
    settings: the recipe.
    checkpoint_dir: folder of checkpoints; if it holds one of the same run, training goes on there.
    progress: called after each epoch, once its checkpoint is written.
    memory_budget: bytes; a training set with fewer bytes of pixels is decoded only once.

  Returns:
    The module itself, trained and in evaluation mode, and the log of all its epochs.

  Raises:
    ValueError: the source is too small, the module's logits do not fit it, the loss is not finite,
      or checkpoint_dir belongs to another run.
  """
  train, held_out = split_held_out(source, settings)
  if len(train) < settings.batch_size:
    raise ValueError(
      f"batch_size is {settings.batch_size}, but {source} has only {len(train)} images to train on"
    )
  data = Epochs(
    source,
    preprocess,
    settings.batch_size,
    indices=train,
    seed=settings.seed,
    memory_budget=memory_budget,
  )
  schedule = learning_rate_schedule(settings, data.steps)
  module.train()
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  _check_logits(graph, params, rest, source, preprocess)

  def entry(epoch: loop.Epoch, state: loop.State) -> dict[str, Any]:
    nnx.update(module, state.params, state.rest)
    log = EpochLog(
      epoch=epoch.epoch,
      step=epoch.step,
      learning_rate=float(np.asarray(schedule(epoch.step - 1))),
      loss=epoch.loss,
      train_top1=100 * (epoch.totals["correct"] / (data.steps * settings.batch_size)),
      held_out_top1=top1(module, source, preprocess, held_out) if held_out.size else None,
    )
    return dataclasses.asdict(log)

  try:
    state, log = loop.train(
      _loss(graph, preprocess, settings),
      params,
      rest,
      make_optimizer(settings, schedule),
      data,
      epochs=settings.epochs,
      seed=settings.seed,
      entry=entry,
      run=_identity(source, preprocess, settings),
      checkpoint_dir=checkpoint_dir,
      checkpoint_every=settings.checkpoint_every,
      progress=None if progress is None else lambda entry: progress(EpochLog(**entry)),
    )
  except loop.DivergedError as error:
    raise loop.DivergedError(
      f"{error}; lower learning_rate ({settings.learning_rate}) or lengthen warmup "
      f"({settings.warmup})"
    ) from None
  nnx.update(module, state.params, state.rest)
  module.eval()
  return module, [EpochLog(**entry) for entry in log]


def top1(
  module: nnx.Module,
  source: Source,
  preprocess: Preprocess,
  indices: np.ndarray | None = None,
) -> float:
  """Accuracy of a module in evaluation mode; the module itself is left as it is.

  Args:
    module: maps float32 [B, H, W, C] to logits [B, K].
    source: the data.
    preprocess: the model's preprocessing.
    indices: which examples, integers [N]; None is all of them.

  Returns:
    Percent of the examples whose greatest logit is the label's.
  """
  evaluated = nnx.clone(module)
  evaluated.eval()
  graph, state = nnx.split(evaluated)
  count = len(source) if indices is None else len(indices)
  batch_size = min(_EVAL_BATCH, count)
  correct = 0
  for batch in batches(source, preprocess, batch_size, indices=indices):
    correct += int(_count_correct(graph, state, *batch))
  return 100 * correct / count


def split_held_out(source: Source, settings: TrainSettings) -> tuple[np.ndarray, np.ndarray]:
  """Which examples of the training split are trained on and which are held out.

  Args:
    source: the training split, N examples.
    settings: `held_out` gives the share and `seed` the draw, balanced over the classes.

  Returns:
    Ascending int64 indices to train on, and those held out; together each of 0..N - 1 once.
  """
  count = round(settings.held_out * len(source))
  if not count:
    return np.arange(len(source)), np.zeros(0, np.int64)
  held_out = np.sort(calibration_indices(source, count, settings.seed))
  return np.setdiff1d(np.arange(len(source)), held_out), held_out


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(graph: Any, state: Any, images: Any, labels: Any, mask: Any) -> jax.Array:
  logits = nnx.merge(graph, state)(images)
  return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & mask)


def _loss(graph: Any, preprocess: Preprocess, settings: TrainSettings) -> loop.Loss:
  """Cross-entropy of augmented images (uint8 [B, H, W, C]) and their labels (int32 [B])."""

  def loss(params, rest, key, batch):
    images, labels = batch
    x = preprocess.normalize(augment(key, images, settings.augmentation))
    # A copy, because NNX writes batch statistics only to variables made inside this trace.
    module = nnx.merge(graph, params, rest, copy=True)
    logits = module(x)
    target = jax.nn.one_hot(labels, logits.shape[-1])
    target = optax.smooth_labels(target, settings.label_smoothing)
    value = optax.softmax_cross_entropy(logits, target).mean()
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return value, (nnx.split(module, nnx.Param, ...)[2], {"correct": correct})

  return loss


def _check_logits(graph: Any, params: Any, rest: Any, source: Source, preprocess: Preprocess):
  """Refuses a module whose logits do not fit the labels, before anything is compiled."""
  pixels = preprocess.geometry(source.image(0))
  x = jax.ShapeDtypeStruct((2, *pixels.shape), jnp.float32)
  logits = jax.eval_shape(lambda p, r, x: nnx.merge(graph, p, r)(x), params, rest, x)
  shape = getattr(logits, "shape", None)
  if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < source.num_classes:
    raise ValueError(
      f"module maps images {list(x.shape)} to {shape and list(shape)}; "
      f"logits [2, K] with K from {source.num_classes}, the classes of {source}, are accepted"
    )


def _identity(source: Source, preprocess: Preprocess, settings: TrainSettings) -> dict[str, Any]:
  """What has to be equal for a checkpoint to be of the same run, as JSON gives it back."""
  fields = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE_SETTINGS}
  fields |= {f"preprocess.{k}": v for k, v in dataclasses.asdict(preprocess).items()}
  fields |= {"source": source.name, "split": source.split, "images": len(source)}
  return json.loads(json.dumps(fields))
