"""Vision models in Flax NNX, by name, as pure functions, and with pretrained weights.

A model, its parameters as a nested dict, and logits of images [B, 224, 224, 3]:

    from flexiq_jax import models

    module = models.create("deit_s")
    apply, params = models.functional(module)
    params = models.weights.load("hf:timm/deit_small_patch16_224.fb_in1k", module, params)
    logits = apply(params, images)
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexiq_jax.models.pure import Apply, Params, flatten, functional, unflatten, with_params
from flexiq_jax.models.registry import MODELS, ModelSpec, create, get

if TYPE_CHECKING:
  from flexiq_jax.models import hub, weights

__all__ = [
  "MODELS",
  "Apply",
  "ModelSpec",
  "Params",
  "create",
  "flatten",
  "functional",
  "get",
  "hub",
  "unflatten",
  "weights",
  "with_params",
]


def __getattr__(name: str) -> Any:
  if name in ("hub", "weights"):  # imported when used: own models need no safetensors and no hub
    return importlib.import_module(f"flexiq_jax.models.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
