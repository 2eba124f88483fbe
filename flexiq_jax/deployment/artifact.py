"""A deployed model on disk: packed weights, and nothing that was needed to make them.

    artifact.save("deployed", model, name="resnet20")
    model = artifact.load("deployed", apply, params, x[:1])

The folder holds the arrays as an Orbax checkpoint and `artifact.json` (see `deployment.document`),
which says what they are. It is written last: a folder without it is not complete. It holds the
SHA-256 of every file of the checkpoint and of itself, which are checked whenever the artifact is
read. Loading takes the float model's code and the shapes of its parameters, but neither weights nor
calibration examples. An export (`deployment.export`) runs without that code as well.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexiq_jax import deployment, graph, models
from flexiq_jax.deployment import document as documents
from flexiq_jax.deployment.document import Document
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.graph import reorder, tracing
from flexiq_jax.runs.checkpoint import Checkpoints

PLATFORMS = ("cpu", "gpu", "tpu")


def save(directory: str | os.PathLike, deployed: deployment.Deployed, *, name: str) -> Path:
  """Writes a deployed model.

  Args:
    directory: a folder that does not exist yet, or is empty.
    deployed: the model.
    name: name of the float model, for readers; nothing checks it.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds something, or the model is `place`d for one device.
  """
  directory = Path(directory)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"directory: {directory} is not empty; name another folder")
  arrays = {"layers": deployed.layers, "floats": deployed.floats, "levels": deployed.levels}
  entries = documents.entries(arrays)
  with Checkpoints(directory / "arrays", keep=1) as checkpoints:
    checkpoints.save(0, arrays)
  documents.write(
    directory / "artifact.json",
    model=name,
    dynamic=deployed.wiring.dynamic,
    folds={name: list(makers) for name, makers in deployed.wiring.folds.items()},
    levels=np.asarray(deployed.levels).tolist(),
    arrays=entries,
    parameters=_parameters(deployed.wiring.params),
    files=_digests(directory / "arrays"),
  )
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
    device: the device it is to run on; the default device if None.

  Raises:
    FileNotFoundError: there is no such artifact.
    ValueError: the artifact is of another version or model, incomplete or damaged, or the device is
      not supported.
  """
  directory = Path(directory)
  device = device or jax.devices()[0]
  check_device(device)
  document = read(directory)
  _check_files(directory, document)
  with Checkpoints(directory / "arrays", keep=1, remedy="") as checkpoints:
    try:
      restored = checkpoints.restore_latest(document.template())
    except ValueError as error:
      raise ValueError(
        f"artifact: {directory} is damaged: {error}; make it again from its recipe"
      ) from error
  if restored is None:
    raise ValueError(f"artifact: {directory} is incomplete: files of `arrays` are missing")
  tree = jax.device_put(restored.tree, device)
  folded, shapes = deployment.fold_shapes(apply, params, x)
  names = {layer.name for layer in graph.layers(folded, shapes, x)}
  _check(directory, document, tree, names, shapes)
  have = tree["layers"]
  low = {name for name, d in have.items() if isinstance(d, Mixed) or _lowered(d)}
  linked = any(not isinstance(d, Plain) and d.feeds for d in have.values())
  wiring = deployment.wire(folded, shapes, x, low, link=linked, dynamic=document.dynamic)
  wiring = dataclasses.replace(wiring, folds=_folds(directory, document, folded, shapes, x))
  feeds = {name: feed.producer or "" for name, feed in wiring.feeds.items()}
  for name, d in have.items():
    if not isinstance(d, Plain) and d.feeds and feeds.get(d.feeds) != name:
      raise ValueError(
        f"artifact: {directory}: layer {name} feeds {d.feeds}, which it does not alone in this "
        "model; was the model's code changed? Make it again from its recipe"
      )
  return deployment.Deployed(wiring=wiring, **tree)


def read(directory: str | os.PathLike) -> Document:
  """What `artifact.json` says.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no artifact, of another version, or damaged.
  """
  return documents.read(Path(directory) / "artifact.json")


def check_device(device: Any) -> None:
  """Refuses devices that this package does not support.

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


def _digests(folder: Path) -> dict[str, str]:
  """SHA-256 of every file of a folder, by its path in it."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(directory: Path, document: Document) -> None:
  """Compares the files of the arrays with those that were written."""
  folder, written = directory / "arrays", document.files
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


def _parameters(params: Any) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters of a float model with batch norm folded."""
  return {path: tuple(a.shape) for path, a in models.flatten(params).items()}


def _check(directory: Path, document: Document, tree: dict, layers: set[str], params: Any) -> None:
  """Checks an artifact against the model it is loaded for, and its boundaries."""
  have, levels = tree["layers"], np.asarray(tree["levels"]).tolist()
  if levels != list(document.levels):
    raise ValueError(
      f"artifact: {directory} is damaged: artifact.json has levels {list(document.levels)}, the "
      f"arrays {levels}; make it again from its recipe"
    )
  for name in [*have, *sorted(layers)]:
    if name not in layers or name not in have:
      where = "the artifact" if name in have else "the model"
      raise ValueError(
        f"artifact: {directory} was made for {document.model!r}; layer {name} is only in {where}"
      )
  made, given = document.parameters, _parameters(params)
  for path in [*made, *given]:
    if made.get(path) != given.get(path):
      sides = [str(list(side[path])) if path in side else "missing" for side in (made, given)]
      raise ValueError(
        f"artifact: {directory} was made for {document.model!r} with a parameter {path} of "
        f"{sides[0]}; in this model it is {sides[1]}"
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
  directory: Path, document: Document, apply: graph.Apply, params: Any, x: Any
) -> dict[str, tuple[str, ...]]:
  """Which layers write in the order of others; checked against the model it is loaded for."""
  folds = document.folds
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
  return folds


def _lowered(d: Any) -> bool:
  """Whether a layer without a kernel has groups in 4 bits."""
  return isinstance(d, Plain) and d.masks is not None
