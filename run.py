"""Runs one experiment.

    python run.py --config=configs/NAME.py[:argument,...] [--workdir=DIR] [--config.field=value ...]

The same command with the same workdir resumes a run that was stopped; a finished one is left alone.
"""

import shlex
import sys
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

import experiments
from experiments import setup
from flexiq_jax import runtime
from flexiq_jax.metrics import Writer

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if missing.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show config and layers, run nothing.")
_OVERRULE = flags.DEFINE_bool("overrule", False, "Go on in a workdir of another config.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_CACHE = flags.DEFINE_string("compilation_cache", None, "Folder for compiled programs.")


def main(argv):
  """Checks the config, then hands over to the experiment."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}: flags begin with --")
  config = _CONFIG.value
  if config.experiment not in experiments.EXPERIMENTS:
    known = ", ".join(experiments.EXPERIMENTS)
    raise ValueError(f"config.experiment: {config.experiment!r} is not one of {known}")
  experiment = experiments.EXPERIMENTS[config.experiment]
  if _DRY_RUN.value:
    print(config)
    print(experiment.describe(config))
    return
  workdir = Path(_WORKDIR.value) if _WORKDIR.value else setup.default_workdir(config)
  if not _WORKDIR.value:
    print(f"workdir: {workdir}")
  runtime.enable_compilation_cache(_CACHE.value)
  writer = Writer(workdir)
  writer.config(config.to_dict(), overrule=_OVERRULE.value)
  if message := writer.finished_message():
    print(message)
    return
  command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
  path = experiment.run(config, workdir, writer, command)
  print(f"report: {path}")


def _entry(argv):
  with runtime.interruptible():
    try:
      main(argv)
    except (ValueError, OSError) as error:
      if _DEBUG.value:
        traceback.print_exc()
      sys.exit(f"error: {error}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  flags.FLAGS.set_default("verbosity", -1)  # warnings: libraries log every file they write
  app.run(_entry)
