"""A small sweep that needs no data: group sizes and seeds on the digits, six cells.

An example to copy, and what the tests of clusters run. Not an experiment of the paper.

    python run.py --config=configs/sweep_digits.py --dry_run
    python run.py --config=configs/sweep_digits.py --config.local.processes=2
    python run.py --config=configs/sweep_digits.py:runlocal --config.executor=slurm

About a minute a cell on one CPU core; `runlocal` has random weights and few images: ten seconds a
cell.
Float top-1 about 99 %.
"""

from configs import common
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

_TINY = (
  ("model_args", "width=8,depths=(1,)"),
  ("weights", "random"),
  ("calibration.images", 16),
  ("calibration.batch_size", 16),
  ("data.limit", 20),
  ("batch_size", 20),
  ("search.method", "greedy"),
)


def get_config(arg=None):
  """Returns the config; the argument `runlocal` makes the cells as small as they can be."""
  options = common.parse_arg(arg, runlocal=False)
  own = "flexiq_greedy" if options.runlocal else "flexiq_gram"
  layout = Layout(
    title="group size",
    rows="groups.group_size",
    columns=(
      ("float", "method=float"),
      ("INT8", "method=uniform_int8"),
      *(
        (f"{ratio:.0%} 4-bit".replace("%", " %"), f"method={own},ratio={ratio}")
        for ratio in (0.5, 1.0)
      ),
      ("INT4", "method=uniform_int4"),
    ),
  )
  return sweeps.sweep(
    "sweep_digits" + ("_runlocal" if options.runlocal else ""),
    {
      "digits": sweeps.base(
        "configs/digits.py:runlocal",
        fields=_TINY if options.runlocal else (("train.epochs", 8),),
        minutes=0.2 if options.runlocal else 1.0,
        memory=1.0,
      )
    },
    axes=(("groups.group_size", (2, 4, 8)),),
    seeds=(0, 1),
    tables={"group_size": layout},
  )
