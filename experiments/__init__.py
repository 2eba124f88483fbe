"""Jobs that a config can name, one file each.

| function | what it does |
|---|---|
| `describe(config)` | text for `--dry_run`; reads and writes nothing |
| `prepare(config)` | checks everything and opens what the job reads; writes nothing |
| `run(inputs, workdir, command)` | the job; returns the report's path |
| `collect(inputs, runs, workdir, command, seconds)` | for `table`: their joint report |
"""

import importlib
from types import ModuleType

EXPERIMENTS = (
  *("curve", "ablation", "compare", "deploy", "serve", "table"),
  *("fig8", "fig9", "latency", "npu"),
)
# Not a run but many of them; its functions take other arguments (see sweep.py).
SWEEP = "sweep"


def job(name: str) -> ModuleType:
  """The module of one of `EXPERIMENTS`; only its own imports are waited for."""
  return importlib.import_module(f"experiments.{name}")
