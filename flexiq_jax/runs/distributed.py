"""Several processes that run one program, on one machine or on many (`jax.distributed`).

Every process computes the same things in the same order, and a search's population is spread over
the devices of all (`search.population_mesh`). What could differ between processes (files, the time,
rounding) is read by the main process alone, number 0, and sent to the others.

A process that fails leaves at once instead of waiting for the others at the exit, as JAX does.
JAX's coordination service, which lives in the main process, then ends them: within seconds where it
was the main one, else after missed heartbeats (100 s).
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")  # what JAX reads of it
_meetings = itertools.count()
_WAIT = 2**31 - 1  # milliseconds, 24 days
_CHUNK = 1 << 26  # bytes sent at once, which devices hold meanwhile


def initialize() -> None:
  """Joins the other processes, where the environment says that there are any.

  Call it before JAX touches a device. Either `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
  `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so, or SLURM does: `srun` with several tasks.

  Raises:
    ValueError: some variables are there and others missing, or one is no valid number.
  """
  arguments = arguments_from(os.environ)
  if arguments is None or jax.distributed.is_initialized():
    return
  # It would catch SIGTERM, which ends a run in order (`interruption.interruptible`).
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(**arguments)


def arguments_from(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None for a process alone. Raises as `initialize`."""
  if given := [name for name in _JAX if environment.get(name)]:
    if missing := [name for name in _JAX if name not in given]:
      raise ValueError(
        f"{missing[0]} is not set, but {given[0]} is: for several processes set {', '.join(_JAX)}, "
        "for one set none of them"
      )
    address, count = environment[_JAX[0]], _integer(environment, _JAX[1], 1)
    rank = _integer(environment, _JAX[2], 0, count - 1)
    if not address.rpartition(":")[2].isdigit():
      raise ValueError(f"{_JAX[0]}: {address!r}; host:port of process 0 is accepted")
    if count == 1:
      return None
    return {
      "coordinator_address": address,
      "num_processes": count,
      "process_id": rank,
      "cluster_detection_method": "deactivate",  # SLURM, too, may be there
    }
  if "SLURM_JOB_ID" not in environment or "SLURM_NTASKS" not in environment:
    return None
  if _integer(environment, "SLURM_NTASKS", 1) == 1:
    return None
  if missing := [name for name in _SLURM if not environment.get(name)]:
    raise ValueError(
      f"{missing[0]} is not set, but SLURM_NTASKS is {environment['SLURM_NTASKS']}: start all "
      "processes with srun, or a single one with srun --ntasks=1"
    )
  return {"cluster_detection_method": "slurm"}


def several() -> bool:
  """Whether this process is one of several."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
  """Whether this process writes files and prints: number 0, or the only one."""
  return not several() or jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Starts and ends a program together with the other processes, if there are any.

  Only the main process writes to standard output. At the end the others wait for it, however long
  it goes on alone. Where the block raises, this process does not wait for the others.
  """
  initialize()
  if not several():
    yield
    return
  if not is_main():
    sys.stdout.flush()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # of C++ libraries, too
    os.close(silent)
  try:
    yield
    broadcast_bytes(None)
  except BaseException as error:
    code = error.code if isinstance(error, SystemExit) else 1
    # Behind the message of the error and in front of JAX's handler, which waits for the others.
    atexit.register(_leave, code if isinstance(code, int) else 1)
    raise


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
  """The folder that a process may write to: `path` in the main one, elsewhere a temporary one."""
  if is_main():
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="flexiq_jax_") as temporary:
    yield Path(temporary)


def broadcast_bytes(data: bytes | None) -> bytes | None:
  """The main process's bytes, or None where it has None, in all processes.

  Args:
    data: in the main process what to send; elsewhere not looked at.
  """
  if not several():
    return data
  # Where the main process is busy alone for hours, collectives of CPU devices would give up.
  key = f"flexiq_jax_{next(_meetings)}"  # a name serves once
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=_WAIT)
  data = data if is_main() else b""
  length = np.array([-1 if data is None else len(data)], np.int64)
  # Eight bytes: without 64-bit mode JAX would cut an integer in half.
  size = int(_broadcast(length.view(np.uint8)).view(np.int64)[0])
  if size < 0:
    return None
  parts = []
  for start in range(0, size, _CHUNK):
    count = min(_CHUNK, size - start)
    part = np.zeros(1 << (count - 1).bit_length(), np.uint8)  # few lengths, few compilations
    if is_main() and data is not None:
      part[:count] = np.frombuffer(data, np.uint8, count, start)
    parts.append(_broadcast(part)[:count].tobytes())
  return b"".join(parts)


def agree(value: Any) -> Any:
  """The main process's value, of what JSON can hold, in all processes."""
  if not several():
    return value
  data = broadcast_bytes(json.dumps(value).encode() if is_main() else None)
  assert data is not None
  return json.loads(data)


def agree_array(array: np.ndarray) -> np.ndarray:
  """The main process's array in all processes, bit for bit; all have one of its shape and dtype."""
  if not several():
    return array
  data = broadcast_bytes(np.asarray(array).tobytes())
  assert data is not None
  return np.frombuffer(data, array.dtype).reshape(array.shape).copy()


def mine(items: range) -> range:
  """The part of some items that is this process's work: item i is number i mod N's."""
  return items[jax.process_index() :: jax.process_count()] if several() else items


def sum_parts(array: Any) -> np.ndarray:
  """Sum over processes of an array each has its part of; in their order, so the same bits in all.

  Args:
    array: of the same shape and dtype in each.
  """
  array = np.asarray(array)
  if not several():
    return array
  flat, total = np.ascontiguousarray(array).reshape(-1), []
  step = max(1, _CHUNK // (array.itemsize * jax.process_count()))
  for start in range(0, flat.size, step):
    # As bytes: JAX would round 64-bit numbers.
    sent = flat[start : start + step].view(np.uint8)
    parts = np.asarray(multihost_utils.process_allgather(sent)).view(array.dtype)
    part = parts[0].copy()
    for other in parts[1:]:
      part += other
    total.append(part)
  return np.concatenate([*total, flat[:0]]).reshape(array.shape)


def _broadcast(sent: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(multihost_utils.broadcast_one_to_all(sent))


def _integer(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
  text = environment[name]
  if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
    accepted = f"{least}..{most}" if most is not None else f"an integer from {least}"
    raise ValueError(f"{name}: {text!r}; {accepted} is accepted")
  return int(text)


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
