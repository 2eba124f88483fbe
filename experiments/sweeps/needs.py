"""What a run needs and this machine does not have, found without reading weights or images."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from flexiq_jax import data
from flexiq_jax.models import hub

_PROBE_SECONDS = 2.0


def missing(config: Any) -> str:
  """Why a run of a config cannot start here; empty where nothing is known to be missing."""
  problems = [_weights(config.weights.replace("{model}", config.model))]
  for name in ("data", "calibration"):
    part = config[name]
    problems.append(_data(part.name, part.split, part.root))
  if config.recipe:
    problems.append(_recipe(config.recipe))
  return "; ".join(dict.fromkeys(filter(None, problems)))


@functools.cache
def _weights(source: str) -> str:
  if source in ("train", "random"):
    return ""
  if not source:
    return "weights are not named"
  if source.startswith("hf:"):
    return "" if _in_cache(source) or _hub_answers() else f"weights not here: {source}"
  try:
    hub.resolve(source)
  except (ValueError, OSError):
    return f"weights not here: {source}"
  return ""


@functools.cache
def _data(name: str, split: str, root: str) -> str:
  try:
    data.open_source(name, split, root=root or None)
  except OSError:
    return f"data not here: {root or name}"
  except ValueError as error:
    if "is not set" in str(error) or "no folder" in str(error):
      return f"data not here: {root or name}"
    return f"data: {error}"
  return ""


@functools.cache
def _recipe(path: str) -> str:
  return "" if Path(os.path.expandvars(path)).expanduser().is_file() else f"recipe not here: {path}"


def _in_cache(source: str) -> bool:
  found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", source)
  if found is None:
    return False
  name = found[3] or "model.safetensors"
  return isinstance(huggingface_hub.try_to_load_from_cache(found[1], name, revision=found[2]), str)


@functools.cache
def _hub_answers() -> bool:
  """Whether weights could be fetched; asked once."""
  if constants.HF_HUB_OFFLINE:
    return False
  try:
    huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
  except Exception:  # of whichever HTTP library
    return False
  return True
