"""A table over runs: one job for several seeds, one after the other, and what they say together.

A run is one model, one data set and one seed, in a workdir of its own (`seed0/`, ...) with a config
of its own, that of `--config.experiment=JOB --config.seed=0`. It is resumed, or left
alone when it is finished, by its own rules. The joint report is the job's `collect`.
"""

import dataclasses
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import ablation, compare
from experiments.shared import identity, setup
from experiments.shared.checks import is_seed, require
from flexiq_jax.runs import distributed, process
from flexiq_jax.runs.workdir import Workdir

JOBS: dict[str, ModuleType] = {"ablation": ablation, "compare": compare}


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  return _job(config).describe(_part(config, config.table.seeds[0]))


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  inputs = _job(config).prepare(_part(config, config.table.seeds[0]))
  return dataclasses.replace(inputs, config=config)


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Does all runs that are missing; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  job = _job(config)
  workdir.event("start", command=command, **process.describe())
  runs = []
  for seed in config.table.seeds:
    part = _part(config, seed)
    with distributed.folder(workdir.path / f"seed{seed}") as folder:
      one = Workdir(folder)
      one.config(identity.plain(part))
      one.about = setup.provenance(part)
      if distributed.agree(not one.finished):
        with one.held():
          job.run(dataclasses.replace(inputs, config=part), one, command)
      runs.append(one)
  if not distributed.is_main():
    return workdir.path / "report.md"
  workdir.join(runs)
  path = job.collect(inputs, runs, workdir, command, time.monotonic() - started)
  workdir.finish()
  return path


def _job(config) -> ModuleType:
  require(config, "table", "configs/ablation.py:of=NAME")
  table = config.table
  if table.job not in JOBS:
    raise ValueError(f"config.table.job: {table.job!r} is not one of {', '.join(JOBS)}")
  for seed in table.seeds:
    if not is_seed(seed):
      raise ValueError(f"config.table.seeds: {seed!r} is not in 0..{2**31 - 1}")
  if len(set(table.seeds)) < max(1, len(table.seeds)):
    raise ValueError(f"config.table.seeds: {table.seeds}; at least one, all different")
  return JOBS[table.job]


def _part(config, seed: int) -> Any:
  """The config of one run."""
  part = config.copy_and_resolve_references()
  part.unlock()
  del part.table
  part.experiment, part.seed = config.table.job, seed
  return part.lock()
