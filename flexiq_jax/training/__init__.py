"""Training: a loop that can be killed at any time, and image classifiers as a user of it.

Beside these names the modules `loop` and `classification` are for use from outside.
"""

from flexiq_jax.training.settings import (
  AUGMENTATIONS,
  TrainSettings,
  augment,
  is_real,
  is_whole,
  random_crop,
  require,
  require_positive,
)

__all__ = [
  "AUGMENTATIONS",
  "TrainSettings",
  "augment",
  "is_real",
  "is_whole",
  "random_crop",
  "require",
  "require_positive",
]
