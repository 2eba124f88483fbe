"""A deployed model on disk: packed weights, and nothing that was needed to make them.

    artifact.save("deployed", model, name="resnet20")
    model = artifact.load("deployed", apply, params, x[:1])

The folder holds the arrays as an Orbax checkpoint and `artifact.json`, which says what they are.
It is written last: a folder without it is not complete. It holds the SHA-256 of every file of the
checkpoint and of itself, which are checked whenever the artifact is read. Loading takes the float
model's code and the shapes of its parameters, no weights and no calibration examples. What runs
without that code, too, is an export (`deployment.export`).
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import deployment, graph, models
from flexiq_jax.deployment.depthwise import Depthwise
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.graph import reorder, tracing
from flexiq_jax.kernels import Weights
from flexiq_jax.quant import rules
from flexiq_jax.runs import files
from flexiq_jax.runs.checkpoint import Checkpoints

FORMAT = "flexiq_jax deployed model"
VERSION = 2
PLATFORMS = ("cpu", "gpu", "tpu")
_TYPES = {t.__name__: t for t in (Mixed, Plain, Depthwise, Weights, rules.QLayer, rules.Low)}


def save(directory: str | os.PathLike, deployed: deployment.Deployed, *, name: str) -> Path:
  """Writes a deployed model.

  Args:
    directory: a folder that does not exist yet, or is empty.
    deployed: the model.
    name: of the float model, checked by nobody, for people.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds something.
  """
  directory = Path(directory)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"directory: {directory} is not empty; name another folder")
  arrays = {"layers": deployed.layers, "floats": deployed.floats, "levels": deployed.levels}
  with Checkpoints(directory / "arrays", keep=1) as checkpoints:
    checkpoints.save(0, arrays)
  document = {
    "format": FORMAT,
    "version": VERSION,
    "model": name,
    "dynamic": deployed.wiring.dynamic,
    "folds": {name: list(makers) for name, makers in deployed.wiring.folds.items()},
    "levels": np.asarray(deployed.levels).tolist(),
    "arrays": _encode(arrays),
    "parameters": _parameters(deployed.wiring.params),
    "files": _digests(directory / "arrays"),
  }
  document["sha256"] = _seal(document)
  files.write_text(directory / "artifact.json", json.dumps(document, indent=1) + "\n")
  return directory


def load(
  directory: str | os.PathLike,
  apply: graph.Apply,
  params: Any,
  x: Any,
  *,
  device: Any = None,
) -> deployment.Deployed:
  """Reads a deployed model.

  Args:
    directory: the folder.
    apply: the float model, `(params, x) -> y`, as it was given to `Network`.
    params: its parameters, or their shapes.
    x: example input(s), arrays or `jax.ShapeDtypeStruct`s.
    device: where it is to run; the default device if None.

  Raises:
    FileNotFoundError: there is no such artifact.
    ValueError: of another version, incomplete, damaged, of another model, or for no such device.
  """
  directory = Path(directory)
  device = device or jax.devices()[0]
  check_device(device)
  document = read(directory)
  try:
    template = _decode(document["arrays"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"artifact: {directory} is damaged: artifact.json: {error!r}") from None
  _check_files(directory, document)
  with Checkpoints(directory / "arrays", keep=1) as checkpoints:
    try:
      restored = checkpoints.restore_latest(template)
    except ValueError as error:
      raise ValueError(f"artifact: {directory} is damaged: {error}") from error
  if restored is None:
    raise ValueError(f"artifact: {directory} is incomplete: files of `arrays` are missing")
  tree = jax.device_put(restored.tree, device)
  folded, shapes = deployment.fold_shapes(apply, params, x)
  names = {layer.name for layer in graph.layers(folded, shapes, x)}
  _check(directory, document, tree, names, shapes)
  have = tree["layers"]
  low = {name for name, d in have.items() if isinstance(d, Mixed) or _lowered(d)}
  linked = any(not isinstance(d, Plain) and d.feeds for d in have.values())
  wiring = deployment.wire(folded, shapes, x, low, link=linked, dynamic=document["dynamic"])
  wiring = dataclasses.replace(wiring, folds=_folds(directory, document, folded, shapes, x))
  feeds = {name: feed.producer or "" for name, feed in wiring.feeds.items()}
  for name, d in have.items():
    if not isinstance(d, Plain) and d.feeds and feeds.get(d.feeds) != name:
      raise ValueError(
        f"artifact: {directory}: layer {name} feeds {d.feeds}, which it does not alone in this "
        "model; was the model's code changed? Make it again from its recipe"
      )
  return deployment.Deployed(wiring=wiring, **tree)


def read(directory: str | os.PathLike) -> dict[str, Any]:
  """What `artifact.json` says.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no artifact, or of another version.
  """
  path = Path(directory) / "artifact.json"
  if not path.is_file():
    raise FileNotFoundError(f"artifact: {path} does not exist; was it written to its end?")
  try:
    document = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"artifact: {path} is damaged: not JSON ({error})") from None
  if not isinstance(document, dict) or document.get("format") != FORMAT:
    raise ValueError(f"artifact: {path} is no artifact (its `format` is not {FORMAT!r})")
  if document.get("version") != VERSION:
    raise ValueError(
      f"artifact: {path} has version {document.get('version')!r}; this release reads {VERSION}; "
      "make it again from its recipe"
    )
  if document.get("sha256") != _seal(document):
    raise ValueError(
      f"artifact: {path} is damaged: it is not what was written; make it again from its recipe"
    )
  return document


def check_device(device: Any) -> None:
  """Refuses devices that nothing here was made for.

  Raises:
    ValueError: names the device and what to use.
  """
  if device.platform not in PLATFORMS:
    raise ValueError(
      f"device: {device.device_kind} (platform {device.platform}) is not supported; use a device "
      f"of platform {', '.join(PLATFORMS)}, as jax.devices('cpu')[0]"
    )


def bytes_on_disk(directory: str | os.PathLike) -> int:
  """Size of all files of an artifact."""
  return sum(p.stat().st_size for p in Path(directory).rglob("*") if p.is_file())


def _seal(document: dict[str, Any]) -> str:
  """SHA-256 of all that a document says, but for the one it holds."""
  said = {key: value for key, value in document.items() if key != "sha256"}
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
  """SHA-256 of every file of a folder, by its path in it."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in paths
  }


def _check_files(directory: Path, document: dict[str, Any]) -> None:
  """Compares the files of the arrays with those that were written."""
  folder, written = directory / "arrays", document["files"]
  if not folder.is_dir():
    raise ValueError(f"artifact: {directory} is incomplete: it has no folder `arrays`")
  have = _digests(folder)
  if missing := sorted(written.keys() - have.keys()):
    raise ValueError(f"artifact: {directory} is incomplete: arrays/{missing[0]} is missing")
  if changed := sorted(path for path, digest in have.items() if written.get(path) != digest):
    raise ValueError(
      f"artifact: {directory} is damaged: arrays/{changed[0]} is not what was written; make it "
      "again from its recipe"
    )


def _parameters(params: Any) -> dict[str, list[int]]:
  """Path -> shape of the parameters of a float model with batch norm folded."""
  return {path: list(a.shape) for path, a in models.flatten(params).items()}


def _check(directory: Path, document: dict, tree: dict, layers: set[str], params: Any) -> None:
  """Checks an artifact against the model it is loaded for, and its boundaries."""
  have, model = tree["layers"], document["model"]
  for name in [*have, *sorted(layers)]:
    if name not in layers or name not in have:
      where = "the artifact" if name in have else "the model"
      raise ValueError(
        f"artifact: {directory} was made for {model!r}; layer {name} is only in {where}"
      )
  made, given = document["parameters"], _parameters(params)
  for path in [*made, *given]:
    if made.get(path) != given.get(path):
      sides = [str(side.get(path, "missing")) for side in (made, given)]
      raise ValueError(
        f"artifact: {directory} was made for {model!r} with a parameter {path} of {sides[0]}; in "
        f"this model it is {sides[1]}"
      )
  for name, d in have.items():
    if not isinstance(d, Mixed):
      continue
    places, at = len(d.weights.x_shift) * d.channels, np.asarray(d.places)
    if len(at) != len(tree["levels"]) or at.min() < 0 or at.max() > places:
      raise ValueError(
        f"artifact: {directory} is damaged: layer {name} has boundaries {at.tolist()}; "
        f"{len(tree['levels'])} in 0..{places} are accepted"
      )


def _folds(
  directory: Path, document: dict, apply: graph.Apply, params: Any, x: Any
) -> dict[str, tuple[str, ...]]:
  """Which layers write in the order of others; checked against the model it is loaded for."""
  folds = document.get("folds", {})
  if not folds:
    return {}
  traced = tracing.trace(apply, params, x)
  channels = {layer.name: layer.in_channels for layer in traced.layers.values()}
  for name, makers in folds.items():
    have: list[str] = []
    if name in channels and (run := reorder.run_length(traced, name)):
      have = [*reorder.reorder(traced, name, np.roll(np.arange(channels[name]), run)).outputs]
    if sorted(have) != sorted(makers):
      raise ValueError(
        f"artifact: {directory}: {', '.join(makers)} write in the order of {name}; in this model "
        f"{', '.join(have) or 'nothing'} would; was its code changed? Make it again from its recipe"
      )
  return {name: tuple(makers) for name, makers in folds.items()}


def _lowered(d: Any) -> bool:
  """Whether a layer without a kernel has groups in 4 bits."""
  return isinstance(d, Plain) and d.masks is not None


def _encode(tree: Any) -> Any:
  """What a tree of arrays is made of, as JSON can hold it."""
  if dataclasses.is_dataclass(tree):
    fields = {f.name: _encode(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    return {"type": type(tree).__name__, **fields}
  if isinstance(tree, dict):
    return {"type": "dict", **{key: _encode(value) for key, value in tree.items()}}
  if tree is None or isinstance(tree, (bool, int, str)):
    return tree
  return {"type": "array", "dtype": str(tree.dtype), "shape": list(tree.shape)}


def _decode(entry: Any) -> Any:
  """The tree again, with `jax.ShapeDtypeStruct`s for arrays."""
  if not isinstance(entry, dict):
    return entry
  kind = entry["type"]
  if kind == "array":
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
  fields = {key: _decode(value) for key, value in entry.items() if key != "type"}
  return fields if kind == "dict" else _TYPES[kind](**fields)
