"""Checkpoints of any pytree, so that a killed run goes on where it was.

A thin layer over Orbax's `CheckpointManager` (https://orbax.readthedocs.io) that adds what a resume
needs to be safe:

  - a step counts only if it was written to its end; what a kill left behind is ignored;
  - the tree is stored flat, under the path of each leaf, and compared with the template by name,
    shape and dtype before anything is read, so that a wrong template is one clear message;
  - leaves are compared with checksums of what was saved: Orbax does not see all damage;
  - leaves are stored as host arrays: a checkpoint says nothing about devices. Typed keys
    (`jax.random.key`) are stored as their key data.

Saving is synchronous: when `save` returns, the step is on disk. Of several processes only number 0
may open a folder; `pack` and `unpack` take a tree to the others.
"""

import errno
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flexiq_jax.runs import files, interruption

# Bytes that Orbax writes beside the arrays, generously.
_PER_LEAF, _PER_STEP = 2**10, 2**17
_CHECKSUMS = "leaf_checksums"  # beside the metadata of a step; steps of older releases have none
# Files that are there only when both items of a step are complete.
_COMPLETE = ("_CHECKPOINT_METADATA", "tree/_METADATA", "tree/manifest.ocdbt", "metadata/metadata")


class Restored(NamedTuple):
  """What `Checkpoints.restore_latest` returns.

  Attributes:
    step: the step the tree was saved at.
    tree: same structure as the template.
    metadata: the dictionary that was saved with it.
  """

  step: int
  tree: Any
  metadata: dict[str, Any]


class Checkpoints:
  """The checkpoints in one folder; a context manager."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 2,
    remedy: str = "remove it to go on from the one before",
  ):
    """Opens a folder of checkpoints and makes it if it is missing.

    Args:
      directory: the folder.
      keep: how many of the newest checkpoints stay, at least 1.
      remedy: what a message about a damaged checkpoint advises.

    Raises:
      ValueError: keep is below 1, or directory is a file.
    """
    self.directory = Path(directory).absolute()
    self._remedy = remedy
    if keep < 1:
      raise ValueError(f"keep is {keep}; 1 or more checkpoints are accepted")
    if self.directory.exists() and not self.directory.is_dir():
      raise ValueError(f"checkpoint directory {self.directory} is a file")
    self.directory.mkdir(parents=True, exist_ok=True)
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:  # otherwise Orbax would wait for the other processes
      alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        create=jax.process_count() == 1,  # Orbax insists; the folder is there
        multiprocessing_options=alone,
      ),
      item_handlers={
        "tree": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        "metadata": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
      },
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Releases what Orbax holds. Everything saved is on disk already."""
    self._manager.close()

  def steps(self) -> list[int]:
    """The complete steps, ascending."""
    return [step for step in self._numbered() if self._is_complete(step)]

  def save(self, step: int, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint.

    Args:
      step: a number, 0 or more, that is not saved yet.
      tree: pytree of arrays, typed keys and Python numbers.
      metadata: anything JSON can hold, under any name but "leaf_checksums".

    Raises:
      ValueError: the step is saved already, or a leaf is neither array nor number.
      OSError: the disk is full (ENOSPC, EDQUOT).
    """
    if step < 0 or step in self.steps():
      raise ValueError(
        f"step {step} cannot be saved in {self.directory}; "
        f"a number that is not saved yet is accepted (saved: {self.steps()})"
      )
    self._move_aside_incomplete()
    arrays = {name: _to_host(name, leaf) for name, leaf in _named_leaves(tree)}
    size = sum(array.nbytes + _PER_LEAF for array in arrays.values()) + _PER_STEP
    files.require_space(self.directory, size)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          # Orbax refuses arrays without elements; the template knows all there is to know of them.
          tree=ocp.args.StandardSave({n: a for n, a in arrays.items() if a.size}),
          metadata=ocp.args.JsonSave((metadata or {}) | {_CHECKSUMS: _checksums(arrays)}),
        ),
        force=True,  # without it a step below the newest one is skipped silently
      )
    except Exception as error:  # TensorStore says it in the text alone
      if "os_error_code='28'" not in str(error):
        raise
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from None
    interruption.check()  # now that it is on disk

  def restore_latest(self, template: Any) -> Restored | None:
    """Reads the newest complete checkpoint.

    Args:
      template: pytree of the saved structure, with arrays (or `jax.ShapeDtypeStruct`), typed keys
        and numbers. Arrays come back as JAX or NumPy arrays as the template has them; JAX arrays
        with the template's sharding.

    Returns:
      Step, tree and metadata; None where nothing complete is saved.

    Raises:
      ValueError: the checkpoint has other leaves, shapes or dtypes than the template, or its files
        are damaged.
    """
    steps = self.steps()
    if not steps:
      return None
    step = steps[-1]
    where = f"checkpoint {self.directory / str(step)}"
    leaves = _named_leaves(template)
    wanted = {n: s for n, leaf in leaves if 0 not in (s := _stored_form(leaf)).shape}
    try:
      stored = self._manager.item_metadata(step).tree.tree
      _compare(where, stored, wanted)
      # Views of one zero: a NumPy template keeps 64-bit dtypes and needs no memory.
      empty = {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in wanted.items()}
      read: Any = self._manager.restore(
        step,
        args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(empty), metadata=ocp.args.JsonRestore()
        ),
      )
      metadata = dict(read.metadata)
      saved, found = metadata.pop(_CHECKSUMS, {}), _checksums(read.tree)
      if wrong := [name for name in saved if found[name] != saved[name]]:
        raise ValueError(f"leaf '{min(wrong)}' is not what was saved")
    except _MismatchError as error:
      raise ValueError(str(error)) from None
    except Exception as error:  # Orbax and TensorStore have no common base class
      advice = f"; {self._remedy}" * bool(self._remedy)
      raise ValueError(f"{where} cannot be read{advice}: {error}") from error
    restored = [_from_host(read.tree.get(name), leaf) for name, leaf in leaves]
    tree = jax.tree.unflatten(jax.tree.structure(template), restored)
    return Restored(step, tree, metadata)

  def _numbered(self) -> list[int]:
    return sorted(int(p.name) for p in self.directory.iterdir() if p.is_dir() and p.name.isdigit())

  def _is_complete(self, step: int) -> bool:
    return all((self.directory / str(step) / file).is_file() for file in _COMPLETE)

  def _move_aside_incomplete(self) -> None:
    """Renames incomplete steps: Orbax would count them among those to keep."""
    incomplete = [step for step in self._numbered() if not self._is_complete(step)]
    for step in incomplete:
      number = 0
      while (aside := self.directory / f"{step}.incomplete-{number}").exists():
        number += 1
      (self.directory / str(step)).rename(aside)
    if incomplete:
      self._manager.reload()


def pack(tree: Any, metadata: Any = None) -> bytes:
  """A tree, as `Checkpoints.save` takes it, and what JSON can hold, as bytes for `unpack`."""
  arrays: dict[str, Any] = {
    f"tree/{name}": _to_host(name, leaf) for name, leaf in _named_leaves(tree)
  }
  out = io.BytesIO()
  np.savez(out, **arrays, metadata=json.dumps(metadata))
  return out.getvalue()


def unpack(template: Any, data: bytes) -> tuple[Any, Any]:
  """The tree and the metadata that were packed; for the template see `Checkpoints`."""
  with np.load(io.BytesIO(data), allow_pickle=False) as stored:
    leaves = [
      # The view: NumPy's format does not know bfloat16.
      _from_host(stored[f"tree/{name}"].view(_stored_form(leaf).dtype), leaf)
      for name, leaf in _named_leaves(template)
    ]
    metadata = json.loads(str(stored["metadata"]))
  return jax.tree.unflatten(jax.tree.structure(template), leaves), metadata


def _checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
  """CRC-32 of the values of each array that has any."""
  return {name: zlib.crc32(array.tobytes()) for name, array in arrays.items() if array.size}


class _MismatchError(Exception):
  """The checkpoint and the template differ."""


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Leaves under their paths, as `params/conv1/kernel`."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in paths]
  names = [name for name, _ in named]
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"two leaves of the tree have the path '{twice}'; rename one")
  return named


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(name: str, leaf: Any) -> np.ndarray:
  array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
  if array.dtype.hasobject or array.dtype.kind in "USM":
    raise ValueError(f"leaf '{name}' is {type(leaf).__name__}; arrays and numbers are accepted")
  return array


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
  """Something with the shape and dtype that a leaf has on disk."""
  if _is_key(leaf):
    return jax.eval_shape(jax.random.key_data, leaf)
  return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def _from_host(array: np.ndarray | None, leaf: Any) -> Any:
  if array is None:  # an array without elements
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
  if _is_key(leaf):
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
  if isinstance(leaf, jax.Array):
    return jax.device_put(array, leaf.sharding)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jnp.asarray(array)
  return array if isinstance(leaf, np.ndarray) else array.item()


def _compare(where: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
  for names, what in ((wanted.keys() - stored.keys(), "lacks"), (stored.keys() - wanted, "has")):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      other = "the template has" if what == "lacks" else "the template lacks"
      raise _MismatchError(f"{where} {what} '{min(names)}'{more}, which {other}")
  for name, leaf in wanted.items():
    found = stored[name]
    if tuple(found.shape) != tuple(leaf.shape) or np.dtype(found.dtype) != np.dtype(leaf.dtype):
      raise _MismatchError(
        f"{where} holds '{name}' as {np.dtype(found.dtype)} {list(found.shape)}, the template as "
        f"{np.dtype(leaf.dtype)} {list(leaf.shape)}"
      )
