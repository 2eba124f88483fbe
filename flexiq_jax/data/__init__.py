"""Datasets and preprocessing: sources that decode on demand, batches, calibration draws."""

from flexiq_jax.data.draws import calibration_indices, require_separate
from flexiq_jax.data.epochs import MEMORY_BUDGET, Epochs
from flexiq_jax.data.loading import Batch, batches, raw_batches
from flexiq_jax.data.preprocess import Preprocess
from flexiq_jax.data.registry import DATASETS, open_source
from flexiq_jax.data.source import ArraySource, Source, expand_path

__all__ = [
  "DATASETS",
  "MEMORY_BUDGET",
  "ArraySource",
  "Batch",
  "Epochs",
  "Preprocess",
  "Source",
  "batches",
  "calibration_indices",
  "expand_path",
  "open_source",
  "raw_batches",
  "require_separate",
]
