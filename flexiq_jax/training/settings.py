"""What a training run does, as settings and pure functions: schedule, optimizer, augmentation.

The defaults are the CIFAR recipe of He et al., "Deep Residual Learning for Image Recognition"
(2016), section 4.2: SGD with momentum 0.9, weight decay 1e-4, batches of 128, learning rate 0.1,
164 epochs (64k steps), random crops from 4 pixels of padding and flips. Two departures: warm-up and
cosine decay (Loshchilov and Hutter, "SGDR", 2017) in place of two steps down, and no weight decay
of biases and batch normalisation (arrays of one dimension).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd", "adamw")
AUGMENTATIONS = ("none", "shift", "crop_flip")
# Padding of the random crop in pixels: 4 for CIFAR (He et al.), 1 for 8x8 digits.
_PADDING = {"shift": 1, "crop_flip": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
  """Settings of a training run.

  Attributes:
    epochs: passes over the training images.
    batch_size: images a step; the incomplete last batch of an epoch is left out.
    learning_rate: the peak, reached after warm-up.
    warmup: epochs of linear warm-up, may be a fraction.
    weight_decay: L2 (sgd) or decoupled (adamw), on arrays of two and more dimensions.
    momentum: of sgd; adamw keeps its own 0.9 and 0.999.
    optimizer: one of `OPTIMIZERS`.
    label_smoothing: share of the target spread over all classes.
    augmentation: one of `AUGMENTATIONS`: nothing, random shifts by up to one pixel, or random crops
      from 4 pixels of black padding and horizontal flips.
    seed: of the held-out slice, the order of the data and the augmentation.
    held_out: share of the training split that is not trained on but evaluated after every epoch.
    checkpoint_every: epochs between checkpoints; the last epoch is always saved.
  """

  epochs: int = 164
  batch_size: int = 128
  learning_rate: float = 0.1
  warmup: float = 5.0
  weight_decay: float = 1e-4
  momentum: float = 0.9
  optimizer: str = "sgd"
  label_smoothing: float = 0.0
  augmentation: str = "crop_flip"
  seed: int = 0
  held_out: float = 0.1
  checkpoint_every: int = 1

  def __post_init__(self):
    for field in ("epochs", "batch_size", "checkpoint_every", "seed"):
      value, least = getattr(self, field), 0 if field == "seed" else 1
      require(self, field, is_whole(value, least), f"an integer from {least}")
    reals = {
      "learning_rate": (lambda v: v > 0, "a number above 0"),
      "warmup": (lambda v: 0 <= v < self.epochs, f"0 up to, but not, {self.epochs}"),
      "weight_decay": (lambda v: v >= 0, "a number from 0"),
      "momentum": (lambda v: 0 <= v < 1, "0 up to, but not, 1"),
      "label_smoothing": (lambda v: 0 <= v < 1, "0 up to, but not, 1"),
      "held_out": (lambda v: 0 <= v <= 0.5, "0 to 0.5"),
    }
    for field, (fits, accepted) in reals.items():
      value = getattr(self, field)
      require(self, field, is_real(value) and fits(value), accepted)
    require(self, "optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
    require(self, "augmentation", self.augmentation in AUGMENTATIONS, " or ".join(AUGMENTATIONS))


def require(settings: Any, field: str, fits: bool, accepted: str) -> None:
  """Raises a ValueError that names a field of settings, its value and what is accepted."""
  if not fits:
    raise ValueError(f"{field} is {getattr(settings, field)!r}; {accepted} is accepted")


def require_positive(settings: Any, field: str) -> None:
  """Refuses a field of settings that is no finite number above 0."""
  value = getattr(settings, field)
  require(settings, field, is_real(value) and value > 0, "a number above 0")


def is_whole(value: Any, least: int) -> bool:
  """Whether a value is an integer from `least` to the largest of 32 bits."""
  return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def is_real(value: Any) -> bool:
  """Whether a value is a finite number."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def learning_rate_schedule(settings: TrainSettings, steps_per_epoch: int) -> optax.Schedule:
  """Linear warm-up to the peak, then half a cosine down to zero.

  Args:
    settings: the recipe.
    steps_per_epoch: optimizer steps of one epoch.

  Returns:
    Function of the step, 0 for the first. With W steps of warm-up and T in all it is
    `peak * min(1, (step + 1) / W)` below W, then `peak / 2 * (1 + cos(pi * (step - W) / (T - W)))`.
  """
  warm = settings.warmup * steps_per_epoch
  total = settings.epochs * steps_per_epoch

  def schedule(step: Any) -> jax.Array:
    up = jnp.minimum(1.0, (step + 1) / max(warm, 1.0))
    down = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - warm) / (total - warm), 0, 1)))
    return settings.learning_rate * jnp.where(step < warm, up, down)

  return schedule


def make_optimizer(
  settings: TrainSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """The optimizer of a recipe; biases and normalisation (arrays of one dimension) do not decay."""

  def decays(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)

  if settings.optimizer == "adamw":
    return optax.adamw(schedule, weight_decay=settings.weight_decay, mask=decays)
  return optax.chain(
    optax.add_decayed_weights(settings.weight_decay, mask=decays),
    optax.sgd(schedule, momentum=settings.momentum),
  )


def random_crop(key: jax.Array, images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """A part of every image, each at a place of its own.

  Args:
    key: random key.
    images: `[B, H, W, C]`.
    size: height and width of the part, at most H and W.

  Returns:
    `[B, *size, C]`, of the same dtype.
  """
  count, *sides, channels = images.shape
  places = jnp.asarray([sides]) - jnp.asarray([size]) + 1
  offsets = jax.random.randint(key, (count, 2), 0, places)

  def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (*size, channels))

  return jax.vmap(crop)(images, offsets)


def augment(key: jax.Array, images: jax.Array, augmentation: str) -> jax.Array:
  """Augments a batch; every image draws its own offsets and its own flip.

  Args:
    key: typed key.
    images: [B, H, W, C], before normalisation, so that zero is black.
    augmentation: one of `AUGMENTATIONS`.

  Returns:
    The same shape and dtype.
  """
  if augmentation == "none":
    return images
  offset_key, flip_key = jax.random.split(key)
  pad, (count, height, width, _) = _PADDING[augmentation], images.shape
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  cropped = random_crop(offset_key, padded, (height, width))
  if augmentation == "crop_flip":
    flip = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    cropped = jnp.where(flip, cropped[:, :, ::-1], cropped)
  return cropped
