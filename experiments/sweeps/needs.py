"""What a run needs and this machine does not have, found without reading weights or images."""

import functools
from typing import Any

from flexiq_jax import data, models


def missing(config: Any) -> str:
  """Why a run of a config cannot start here; empty where nothing is known to be missing."""
  problems = [_weights(config.weights.replace("{model}", config.model))]
  for name in ("data", "calibration"):
    part = config[name]
    problems.append(_data(part.name, part.split, part.root))
  if config.recipe and not _is_file(config.recipe):
    problems.append(f"recipe not here: {config.recipe}")
  return "; ".join(dict.fromkeys(filter(None, problems)))


@functools.cache
def _weights(source: str) -> str:
  if source in ("train", "random") or models.hub.is_here(source):
    return ""
  if not source:
    return "weights are not named"
  if source.startswith("hf:") and _hub_answers():
    return ""  # to be fetched
  return f"weights not here: {source}"


@functools.cache
def _data(name: str, split: str, root: str) -> str:
  try:
    if root:
      data.expand_path(root)  # a variable that is not set
  except ValueError:
    return f"data not here: {root}"
  try:
    data.open_source(name, split, root=root or None)
  except FileNotFoundError:
    return f"data not here: {root or name}"
  except (ValueError, OSError) as error:
    return f"data: {error}"
  return ""


def _is_file(path: str) -> bool:
  try:
    return data.expand_path(path).is_file()
  except ValueError:
    return False


@functools.cache
def _hub_answers() -> bool:
  """Whether weights could be fetched; asked once."""
  return models.hub.answers()
