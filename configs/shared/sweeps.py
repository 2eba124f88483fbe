"""Sweeps and their base configs."""

from collections.abc import Mapping

from ml_collections import config_dict

from configs.common import settings
from flexiq_jax.runs.sweeps.executors import local, slurm
from flexiq_jax.runs.sweeps.layouts import Layout


def sweep(
  name: str,
  bases: Mapping[str, config_dict.ConfigDict],
  *,
  axes: tuple = (),
  seeds: tuple[int, ...] = (0,),
  computed: tuple[str, ...] = (),
  tables: Mapping[str, Layout],
) -> config_dict.ConfigDict:
  """A sweep: every base with every value of the axes and every seed, each an ordinary run.

  Args:
    name: of the sweep, for its folder.
    bases: name -> what `base` gives; the names begin those of the cells.
    axes: (dotted field, values) pairs.
    seeds: of the runs.
    computed: columns that follow from a run's config (see `experiments.sweeps.computed`).
    tables: name -> layout of a table that the rows fill.
  """
  config = config_dict.ConfigDict()
  config.name, config.experiment = name, "sweep"
  # Cells whose name the regular expression `skip` is found in are left out.
  config.sweep = config_dict.create(
    bases=dict(bases), axes=axes, seeds=seeds, skip="", computed=computed
  )
  config.tables = {key: settings(layout) for key, layout in tables.items()}
  # Where cells run: local, slurm, print; the sections below say how.
  config.executor = "local"
  # Takes only the cells whose name this regular expression is found in.
  config.only = ""
  # Whether cells that failed run again; others are resumed in any case.
  config.retry = False
  # Folders with finished runs that were started by hand: one of a cell's config is that cell.
  config.also = ()
  # Fields in which such a run may differ from its cell; its numbers are then marked.
  config.differ = ()
  # Only shows a sweep that runs elsewhere.
  config.watch = False
  config.local = settings(local.Settings())
  config.slurm = settings(slurm.Settings())
  return config


def base(
  file: str,
  *,
  fields: tuple = (),
  labels: tuple = (),
  minutes: float = 0.0,
  memory: float = 0.0,
  gpus: int = 0,
  tasks: int = 1,
) -> config_dict.ConfigDict:
  """A base config of a sweep.

  Args:
    file: as `configs/resnet20_cifar10.py` or `configs/ablation.py:of=vit_cifar10`.
    fields: (dotted field, value) pairs that are set.
    labels: (column, value) pairs that the rows get.
    minutes: estimated time of one run, until a finished one has shown it.
    memory: estimated host memory, GiB.
    gpus: that a run needs.
    tasks: processes of a run, under SLURM.
  """
  return config_dict.create(
    config=file,
    fields=fields,
    labels=labels,
    minutes=minutes,
    memory=memory,
    gpus=gpus,
    tasks=tasks,
  )
