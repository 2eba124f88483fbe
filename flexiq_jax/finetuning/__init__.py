"""Finetuning: one set of weights that is good at every 4-bit ratio (docs/flexiq.md, step H)."""

from flexiq_jax.finetuning.joint import Examples, finetune, finetune_uniform
from flexiq_jax.finetuning.refit import refit
from flexiq_jax.finetuning.settings import FinetuneSettings

__all__ = ["Examples", "FinetuneSettings", "finetune", "finetune_uniform", "refit"]
