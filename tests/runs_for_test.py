"""Starts of `run.py` inside the test's own process, which saves the imports of a new one."""

import contextlib
import dataclasses
import io
import os
import pathlib
import sys
import warnings
from unittest import mock

import jax
import pytest
from absl import logging
from absl.testing import flagsaver

import run
from flexiq_jax.runs.plots import drawing

DIGITS = "--config=configs/digits.py:runlocal"
# Two selectable layers: little to compile.
LAYERS = "--config.model_args=width=8,depths=(1,)"
TRAINED = (DIGITS, LAYERS, "--config.train.epochs=8")
# And no training, and few images; of any config on digits.
TINY = (
  LAYERS,
  "--config.weights=random",
  "--config.calibration.images=16",
  "--config.calibration.batch_size=16",
  "--config.data.limit=20",
  "--config.batch_size=20",
)
SMALL = (*TRAINED, *TINY)


def several_devices(count: int) -> str:
  """`XLA_FLAGS` of a process with as many CPU devices, compiled as in this one."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  return flags.strip()


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a start ended: exit status, standard output, and the message of a refusal."""

  status: int
  out: str
  error: str


def start(*arguments: str, pictures: bool = False) -> Ended:
  """Runs `python run.py ARGUMENTS`.

  Files of pictures are empty unless asked for: drawing them takes a third of a small run.
  """
  out, err = io.StringIO(), io.StringIO()
  argv = ["run.py", *map(str, arguments)]
  status, message, verbosity = 0, "", logging.get_verbosity()
  precision = jax.config.values["jax_default_matmul_precision"]
  with (
    flagsaver.flagsaver(),
    warnings.catch_warnings(),
    mock.patch.object(sys, "argv", argv),  # overrides of a config are looked up there
    mock.patch.object(drawing, "save", drawing.save if pictures else _leave_empty),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    # ml_collections' own way of loading a config file.
    warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
    try:
      run.entry(run.parse(argv))
    except SystemExit as ended:
      status, message = (ended.code, "") if isinstance(ended.code, int) else (1, str(ended.code))
  logging.set_verbosity(verbosity)
  jax.config.update("jax_default_matmul_precision", precision)  # a run asks for float32
  return Ended(status, out.getvalue(), err.getvalue() + message)


def _leave_empty(_, path: pathlib.Path) -> pathlib.Path:
  """In place of `drawing.save`."""
  for kind in (".png", ".pdf"):
    path.with_suffix(kind).touch()
  return path


@pytest.fixture(scope="session")
def compiled():
  """Argument that has a start, also one in a clean environment, share the session's programs."""
  return f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"
