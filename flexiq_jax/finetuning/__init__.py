"""Finetuning: one set of weights that is good at every 4-bit ratio (docs/flexiq.md, step H)."""

from flexiq_jax.finetuning.examples import Examples, Prepare, examples_mesh
from flexiq_jax.finetuning.joint import finetune, finetune_uniform
from flexiq_jax.finetuning.reconstruction import reconstruct
from flexiq_jax.finetuning.refit import refit
from flexiq_jax.finetuning.settings import FinetuneSettings, ImageSettings, ReconstructionSettings

__all__ = [
  "Examples",
  "FinetuneSettings",
  "ImageSettings",
  "Prepare",
  "ReconstructionSettings",
  "examples_mesh",
  "finetune",
  "finetune_uniform",
  "reconstruct",
  "refit",
]
