"""Finetuned weights on disk: a safetensors file beside the recipe that they go with.

    save("run/recipe.json", recipe, model)
    model = load("run/recipe.json", network)

The recipe names the file, and the file holds the SHA-256 of the recipe and of its own arrays: the
folded parameters as `params/PATH`, and each layer's weight scales as `w_scale/LAYER`. All else that
a quantized model is made of follows from the two files.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from flexiq_jax.adaptive import AdaptiveModel, from_recipe
from flexiq_jax.network import Network
from flexiq_jax.orders import Recipe, recipes
from flexiq_jax.runs import files

FORMAT = "flexiq_jax finetuned weights"
VERSION = "1"
NAME = "finetuned.safetensors"


def save(path: str | os.PathLike[str], recipe: Recipe, model: AdaptiveModel) -> None:
  """Writes a recipe and, beside it, the weights of a finetuned model; the recipe last.

  Args:
    path: of the recipe.
    recipe: the model's.
    model: with weight scales of its own.

  Raises:
    ValueError: the model was not finetuned.
  """
  if model.w_scales is None:
    raise ValueError("model: it has no weight scales of its own, so its recipe says all of it")
  path = Path(path)
  text = recipes.dump(dataclasses.replace(recipe, weights=NAME))
  arrays = {f"params/{name}": a for name, a in _flat(model.network.params).items()}
  arrays |= {f"w_scale/{name}": np.asarray(s) for name, s in model.w_scales.items()}
  about = {
    "format": FORMAT,
    "version": VERSION,
    "recipe": hashlib.sha256(text.encode()).hexdigest(),
    "arrays": _digest(arrays),
  }
  files.write_bytes(path.with_name(NAME), safetensors.numpy.save(arrays, about))
  files.write_text(path, text)


def load(path: str | os.PathLike[str], network: Network, dynamic: bool = False) -> AdaptiveModel:
  """The model of a recipe, with the weights beside it where the recipe names some.

  Args:
    path: of the recipe.
    network: the float model that it was made from.
    dynamic: choose activation shifts at run time.

  Raises:
    FileNotFoundError: no recipe, or its weights are missing.
    ValueError: one of the files is damaged, or they do not go with each other or with the model.
  """
  path = Path(path)
  recipe = recipes.load(path)
  if not recipe.weights:
    return from_recipe(network, recipe, dynamic)
  recipes.require_fit(recipe, network.layers)
  params, scales = _read(path, recipe, network)
  return from_recipe(network.with_params(params), recipe, dynamic, scales)


def check(path: str | os.PathLike[str], recipe: Recipe) -> None:
  """Refuses a recipe whose weights are missing, damaged or of another recipe.

  Raises:
    FileNotFoundError: they are missing.
    ValueError: they are damaged, or of another recipe.
  """
  if recipe.weights:
    _open(Path(path), recipe)


def _open(path: Path, recipe: Recipe) -> dict[str, np.ndarray]:
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


def _read(path: Path, recipe: Recipe, network: Network) -> tuple[Any, Mapping[str, np.ndarray]]:
  arrays = _open(path, recipe)
  have = _flat(network.params)
  want = {f"params/{name}": (a.shape, a.dtype) for name, a in have.items()}
  want |= {
    f"w_scale/{layer.name}": ((layer.out_channels,), np.dtype(np.float32))
    for layer in network.layers
  }
  found = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  if wrong := sorted(n for n in want.keys() | found.keys() if want.get(n) != found.get(n)):
    name = wrong[0]
    raise ValueError(
      f"recipe: the weights beside {path} do not fit the model: {name} is "
      f"{_show(found.get(name))} there and {_show(want.get(name))} in the model"
    )
  structure = jax.tree.structure(network.params)
  params = jax.tree.unflatten(structure, [arrays[f"params/{name}"] for name in have])
  return params, {layer.name: arrays[f"w_scale/{layer.name}"] for layer in network.layers}


def _show(found: tuple[tuple[int, ...], np.dtype] | None) -> str:
  return "missing" if found is None else f"{found[1]} {list(found[0])}"


def _flat(params: Any) -> dict[str, np.ndarray]:
  """Path -> array, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {"/".join(str(key.key) for key in keys): np.asarray(leaf) for keys, leaf in leaves}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  found = hashlib.sha256()
  for name in sorted(arrays):
    a = arrays[name]
    found.update(f"{name} {a.dtype} {list(a.shape)} ".encode())
    found.update(np.ascontiguousarray(a).tobytes())
  return found.hexdigest()
