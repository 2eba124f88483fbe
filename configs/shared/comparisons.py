"""Comparisons with other methods."""

from ml_collections import config_dict

from configs import common
from flexiq_jax.methods import METHODS

# Methods of comparisons that train.
TRAINED = ("ptmq", "robustquant", "anyprecision")


def comparison(of: str, arg: str | None) -> config_dict.ConfigDict:
  """A table of runs of the experiment `compare`, on the model of another config.

  Args:
    of: the config's name.
    arg: its argument; `runlocal` makes the comparison small, too.
  """
  config = common.other(of, arg)
  config.experiment = "table"
  # Which runs: those of a job, one for each seed.
  config.table = config_dict.create(job="compare", seeds=(0, 1, 2))
  small = config.name.endswith("_runlocal")
  config.name = f"compare_{of}" + ("_runlocal" if small else "")
  config.comparison = config_dict.create(
    # See experiments/comparison/tables.py and flexiq_jax/methods/__init__.py; other methods are
    # named as package.module:Class.
    tables=("main", "clado_tensor", "clado_channel", "wide", "float8"),
    methods=(
      *("flexiq_greedy", "flexiq", "uniform", "quantune", "random"),
      *("clado", "clado_block", "clado_diagonal", "mpqco", "hawq"),
    ),
    bits=(4, 8),
    wide_bits=(2, 3, 4, 6, 8),
    averages=(4.0, 5.0, 6.0, 7.0),
    # CLADO's own experiment: shares of the size with 8-bit weights.
    clado_bits=(2, 4, 8),
    sizes=(0.3125, 0.375, 0.4375, 0.5, 0.75),
    # 8 bits and float: shares of the MACs in 8 bits.
    int8_shares=(0.25, 0.5, 0.75, 1.0),
    random_plans=2,
    # Calibration images that CLADO, MPQCO and HAWQ-v3 measure on, 0: all.
    images=0,
    # CLADO: cross_entropy or kl; images in one forward pass; losses below the float model's as 0.
    loss="cross_entropy",
    block=64,
    clip=False,
    # HAWQ-v3: random vectors of the trace.
    probes=32,
    # Seconds for one integer program.
    time_limit=60.0,
    # Methods that train: what is done to training images, and each one's own settings.
    augmentation="crop_flip",
    **{name: common.settings(METHODS[name].Settings()) for name in TRAINED},
  )
  if small:
    config.table.seeds = (0,)
    config.comparison.update(
      tables=("main", "clado_tensor", "float8"),
      averages=(5.0, 6.0),
      sizes=(0.5,),
      int8_shares=(0.5, 1.0),
      random_plans=2,
      block=16,
      probes=2,
      time_limit=5.0,
    )
    config.comparison.ptmq.update(steps=2, batch_size=8)
    for name in ("robustquant", "anyprecision"):
      config.comparison[name].update(steps=2, every=1, batch_size=8)
    config.calibration.update(images=16, batch_size=16)
  return config
