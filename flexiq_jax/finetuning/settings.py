"""What finetuning does, as settings."""

import dataclasses

from flexiq_jax.quant import check_one_of
from flexiq_jax.training import AUGMENTATIONS, is_real, is_whole, require, require_positive

LOSSES = ("kl", "l2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionSettings:
  """Settings of reconstruction.

  Attributes:
    ratios: 4-bit ratios whose outputs count.
    sweeps: passes over all weights of a layer.
    balance: a ratio's error is divided by the one before to this power: 1 lets no ratio gain at the
      cost of another, 0 leaves the largest, at high ratios, the loudest.
  """

  ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  sweeps: int = 4
  balance: float = 0.5

  def __post_init__(self):
    _require_ratios(self, "ratios")
    require(self, "ratios", len(self.ratios) > 0, "at least one number in 0..1")
    require(self, "sweeps", is_whole(self.sweeps, 1), "an integer from 1")
    _require_balance(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
  """Settings of finetuning.

  Attributes:
    steps: optimizer steps; a multiple of `every`.
    batch_size: examples a step.
    learning_rate: of the layers' weights, in 8-bit steps of their output channel; the peak, reached
      after warm-up, from which half a cosine goes down to zero.
    other_learning_rate: of biases and all other parameters, likewise.
    scale_learning_rate: of the logarithms of activation and weight scales, likewise.
    warmup: steps of linear warm-up.
    anchors: 4-bit ratios one of which every step computes, drawn at random.
    ratios: the other ratio of a step is one of these; anything in 0..1 where there are none.
    loss: distance of the logits from the float model's: `kl`, divergence of the predictions, or
      `l2`, the squared error.
    balance: what distances are divided by is the distance at that ratio before the training to this
      power: 0 leaves the largest, at high ratios, the loudest; 1 makes all alike.
    output_weight: weight of the layers' outputs beside it: their squared errors, relative to the
      squares of the float model's outputs, mean over layers.
    label_weight: weight of the cross-entropy with labels beside it; 0 needs no labels.
    every: steps between checkpoints, each with an entry in the log.
    refit: steps between two fits of extraction shifts and mean codes, a multiple of `every`; 0 fits
      them once, at the end.
    reconstruct: whether the weights are rounded by the layers' outputs first (`reconstruct`).
    interpolate: how far from where it started to where training led the result lies, for all that
      was trained, above 0; 1 is the end. Low ratios lose with the square of the way, and the first
      half of it wins most of what high ratios win (Wortsman et al., "Robust fine-tuning of
      zero-shot models", 2022). Of a finished training another value takes no further step.
  """

  steps: int = 1600
  batch_size: int = 32
  learning_rate: float = 0.07
  other_learning_rate: float = 1e-4
  scale_learning_rate: float = 3e-4
  warmup: int = 50
  anchors: tuple[float, ...] = (0.0, 1.0)
  ratios: tuple[float, ...] = ()
  loss: str = "l2"
  balance: float = 0.0
  output_weight: float = 0.0
  label_weight: float = 0.0
  every: int = 100
  refit: int = 400
  reconstruct: bool = True
  interpolate: float = 1.0

  def __post_init__(self):
    for field in ("steps", "batch_size", "every"):
      require(self, field, is_whole(getattr(self, field), 1), "an integer from 1")
    for field in ("warmup", "refit"):
      require(self, field, is_whole(getattr(self, field), 0), "an integer from 0")
    for field in ("learning_rate", "other_learning_rate", "scale_learning_rate"):
      require_positive(self, field)
    for field in ("output_weight", "label_weight"):
      value = getattr(self, field)
      require(self, field, is_real(value) and value >= 0, "a number from 0")
    value = self.interpolate
    require(self, "interpolate", is_real(value) and 0 < value <= 1, "a number above 0, up to 1")
    require(self, "warmup", self.warmup < self.steps, f"fewer than steps ({self.steps})")
    for field in ("steps", "refit"):
      fits = getattr(self, field) % self.every == 0
      require(self, field, fits, f"a multiple of every ({self.every})")
    for field in ("anchors", "ratios"):
      _require_ratios(self, field)
    _require_balance(self)
    check_one_of("loss", self.loss, LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(FinetuneSettings):
  """Settings of finetuning on images of a data set.

  Attributes:
    images: training images, the first of the draw that calibration begins; 0 takes all.
    augmentation: as in `training.TrainSettings`.
    crop: side in pixels of a square part of each image, drawn anew every time, which is trained on
      in its place; 0 takes all of it. A step costs less by the share of the pixels. For models that
      take images of any size.
  """

  images: int = 1000
  augmentation: str = "crop_flip"
  crop: int = 0

  def __post_init__(self):
    super().__post_init__()
    for field in ("images", "crop"):
      require(self, field, is_whole(getattr(self, field), 0), "an integer from 0")
    check_one_of("augmentation", self.augmentation, AUGMENTATIONS)


def _require_balance(settings) -> None:
  fits = is_real(settings.balance) and 0 <= settings.balance <= 1
  require(settings, "balance", fits, "a number in 0..1")


def _require_ratios(settings, field: str) -> None:
  ratios = getattr(settings, field)
  fits = not isinstance(ratios, str | float | int)
  fits = fits and all(is_real(ratio) and 0 <= ratio <= 1 for ratio in ratios)
  require(settings, field, fits, "a tuple of numbers in 0..1")
