"""A table over runs: one job for several seeds, one after the other, and what they say together.

A run is one model, one data set and one seed, in a workdir of its own (`seed0/`, ...) with a config
of its own. The joint report is the job's `collect`.
"""

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import compare
from experiments.shared import setup
from flexiq_jax.runs import runtime
from flexiq_jax.runs.workdir import Workdir

JOBS: dict[str, ModuleType] = {"compare": compare}


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  return JOBS[config.table.job].describe(_part(config, config.table.seeds[0]))


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  return JOBS[config.table.job].prepare(_part(config, config.table.seeds[0]))


def run(config, inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Does all runs that are missing; arguments and result as `experiments.curve.run`."""
  started, job, runs = time.monotonic(), JOBS[config.table.job], []
  workdir.event("start", command=command, **runtime.describe())
  for seed in config.table.seeds:
    one, part = Workdir(workdir.path / f"seed{seed}"), _part(config, seed)
    one.config(part.to_dict())
    if not one.finished:
      job.run(part, inputs, one, command)
    runs.append(one)
  path = job.collect(config, inputs, runs, workdir, command, time.monotonic() - started)
  workdir.finish()
  return path


def _part(config, seed: int) -> Any:
  """The config of one run."""
  part = config.copy_and_resolve_references()
  part.unlock()
  del part.table
  part.experiment, part.seed = config.table.job, seed
  return part.lock()
