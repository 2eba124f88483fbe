"""Finetuning: one set of weights that is good at every 4-bit ratio (docs/flexiq.md, step H)."""

from flexiq_jax.finetuning.files import check, load, save
from flexiq_jax.finetuning.joint import Examples, finetune, finetune_uniform
from flexiq_jax.finetuning.refit import refit
from flexiq_jax.finetuning.settings import FinetuneSettings, ImageSettings

__all__ = [
  "Examples",
  "FinetuneSettings",
  "ImageSettings",
  "check",
  "finetune",
  "finetune_uniform",
  "load",
  "refit",
  "save",
]
