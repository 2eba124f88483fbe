"""Where the cells of a sweep run: one module each, with the same names in it.

| name | what it is |
|---|---|
| `Settings` | a frozen dataclass of the executor's own settings |
| `require(settings)` | refuses where the executor is not there, and says what to do |
| `lacks(cell, settings)` | why a cell cannot run there; empty where it can |
| `run(cells, settings, board)` | runs the cells and returns once all have ended |
"""

import importlib
from types import ModuleType

# Name -> module; each loads libraries that the others do not.
EXECUTORS = {
  "local": "flexiq_jax.runs.sweeps.executors.local",
  "slurm": "flexiq_jax.runs.sweeps.executors.slurm",
  "print": "flexiq_jax.runs.sweeps.executors.printed",
}
__all__ = ["EXECUTORS", "executor"]


def executor(name: str) -> ModuleType:
  """The module of an executor.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in EXECUTORS:
    raise ValueError(f"executor: {name!r} is not one of {', '.join(EXECUTORS)}")
  return importlib.import_module(EXECUTORS[name])
