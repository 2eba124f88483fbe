"""Finetuned weights on disk: a safetensors file beside the recipe that they go with.

The recipe names the file, and the file holds the SHA-256 of the recipe and of its own arrays: the
folded parameters as `params/PATH`, and each layer's weight scales as `w_scale/LAYER`. All else that
a quantized model is made of follows from the two files.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from flexiq_jax.orders import recipes
from flexiq_jax.orders.recipes import Recipe
from flexiq_jax.runs import files

FORMAT = "flexiq_jax finetuned weights"
VERSION = "1"
NAME = "finetuned.safetensors"


def save(path: str | os.PathLike[str], recipe: Recipe, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes weights and the recipe that they go with, which then names them; the recipe last.

  Args:
    path: of the recipe.
    recipe: the recipe.
    arrays: `params/PATH` and `w_scale/LAYER` (see above).
  """
  path = Path(path)
  text = recipes.dump(dataclasses.replace(recipe, weights=NAME))
  about = {
    "format": FORMAT,
    "version": VERSION,
    "recipe": hashlib.sha256(text.encode()).hexdigest(),
    "arrays": _digest(arrays),
  }
  files.write_bytes(path.with_name(NAME), safetensors.numpy.save(dict(arrays), about))
  files.write_text(path, text)


def load(path: str | os.PathLike[str], recipe: Recipe) -> dict[str, np.ndarray]:
  """Reads the weights of a recipe.

  Args:
    path: of the recipe.
    recipe: what it holds.

  Raises:
    FileNotFoundError: they are missing.
    ValueError: they are damaged, or were not written with this recipe.
  """
  path = Path(path)
  file = path.with_name(recipe.weights)
  if not file.is_file():
    raise FileNotFoundError(
      f"recipe: {path} goes with finetuned weights in {file}, which is missing; copy both files"
    )
  try:
    with safetensors.safe_open(file, "numpy") as opened:
      about = opened.metadata() or {}
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
    raise ValueError(f"recipe: {file} is damaged ({error}); finetune again") from None
  if about.get("format") != FORMAT or about.get("version") != VERSION:
    raise ValueError(
      f"recipe: {file} is {about.get('format')!r}, version {about.get('version')!r}; this release "
      f"reads {FORMAT!r}, version {VERSION!r}"
    )
  if about.get("recipe") != hashlib.sha256(path.read_bytes()).hexdigest():
    raise ValueError(
      f"recipe: {file} was not written with {path}: another run's weights, or a recipe that was "
      "changed by hand; give the two files of one run"
    )
  if about.get("arrays") != _digest(arrays):
    raise ValueError(f"recipe: {file} is damaged: its arrays changed; finetune again")
  return arrays


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  found = hashlib.sha256()
  for name in sorted(arrays):
    a = arrays[name]
    found.update(f"{name} {a.dtype} {list(a.shape)} ".encode())
    found.update(np.ascontiguousarray(a).tobytes())
  return found.hexdigest()
