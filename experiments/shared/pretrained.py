"""Pretrained weights that a config names, of its model and of its teacher."""

from typing import Any

from experiments.shared.checks import field
from flexiq_jax import models


def load(part: Any, name: str, module: Any) -> Any:
  """Reads weights from a file or from the hub.

  Args:
    part: the config or a section of it, with the fields `model`, `model_args` and `weights`.
    name: of that section, for messages.
    module: the model, abstract.

  Raises:
    ValueError: they are missing or do not fit; names the field.
  """
  source = part.weights.replace("{model}", part.model)
  _, params = models.functional(module)
  # Overrides make another model than the name says.
  model = module if part.model_args else part.model
  with field(f"{name}.weights"):
    return models.weights.load(source, model, params)
