"""Adaptive mixed-precision quantization in JAX: one 8-bit model, any 4-bit ratio.

    import flexiq_jax as fq

    model = fq.quantize(net_or_apply, params, batches)
    model = fq.improve(model)
    model = fq.reconstruct(model)  # or fq.finetune(model), which trains
    print(model)
    logits = model(x, 0.5)
    print(fq.evaluate(model, (x, labels)))
    model.save("my_model")
    model = fq.load("my_model", net_or_apply, params)
    runner = fq.deploy(model, "artifact")
    fq.export(model, "exported")

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from flexiq_jax import models
  from flexiq_jax.accuracy import Accuracy, evaluate, largest_ratio
  from flexiq_jax.adaptive import AdaptiveModel
  from flexiq_jax.deployed import deploy, export, load_runner
  from flexiq_jax.deployment import Runner
  from flexiq_jax.finetuning import FinetuneSettings
  from flexiq_jax.flexiq import finetune, improve, load, quantize, reconstruct
  from flexiq_jax.network import Network
  from flexiq_jax.quant import LowSettings, RangeSettings
  from flexiq_jax.search import SearchSettings

__all__ = [
  "Accuracy",
  "AdaptiveModel",
  "FinetuneSettings",
  "LowSettings",
  "Network",
  "RangeSettings",
  "Runner",
  "SearchSettings",
  "deploy",
  "evaluate",
  "export",
  "finetune",
  "improve",
  "largest_ratio",
  "load",
  "load_runner",
  "models",
  "quantize",
  "reconstruct",
]

_HOMES = {
  "Accuracy": "accuracy",
  "AdaptiveModel": "adaptive",
  "FinetuneSettings": "finetuning",
  "LowSettings": "quant",
  "Network": "network",
  "RangeSettings": "quant",
  "Runner": "deployment",
  "SearchSettings": "search",
  "deploy": "deployed",
  "evaluate": "accuracy",
  "export": "deployed",
  "largest_ratio": "accuracy",
  "load_runner": "deployed",
}


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  if name == "models":
    return importlib.import_module("flexiq_jax.models")
  return getattr(importlib.import_module(f"flexiq_jax.{_HOMES.get(name, 'flexiq')}"), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
