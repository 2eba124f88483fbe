"""Vision models in Flax NNX, by name, as pure functions, and with pretrained weights.

A model, its parameters as a nested dict, and logits of images [B, 224, 224, 3]:

    from flexiq_jax import models

    module = models.create("deit_s")
    apply, params = models.functional(module)
    params = models.weights.load("hf:timm/deit_small_patch16_224.fb_in1k", module, params)
    logits = apply(params, images)
"""

from flexiq_jax.models import weights
from flexiq_jax.models.pure import Apply, Params, flatten, functional, unflatten, with_params
from flexiq_jax.models.registry import MODELS, ModelSpec, create, get

__all__ = [
  "MODELS",
  "Apply",
  "ModelSpec",
  "Params",
  "create",
  "flatten",
  "functional",
  "get",
  "unflatten",
  "weights",
  "with_params",
]
