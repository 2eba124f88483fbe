"""FlexiQ beside methods that train, at average 4 and 6 bits: PTMQ, RobustQuant, AnyPrecision.

FlexiQ's comparison (EuroSys 2026, Table 5), whose numbers per model are not public, on CIFAR-10:
FlexiQ after training, uniform bits, CLADO, HAWQ-v3, QuantuneV2, and three methods that train or
reconstruct, all from the same float model and training images. How long these three train says
`config.comparison.NAME.steps`; the defaults are for two CPU cores, one pass over CIFAR-10 where
labels are needed, and the sources train 50 to 200. flexiq_jax/methods/__init__.py says what the
methods are.

    python run.py --config=configs/table5.py
    python run.py --config=configs/table5.py --config.comparison.robustquant.steps=3900

ResNet-20, float top-1 91.7 %; selection without training takes some ten minutes on two CPU cores.
"""

from configs import common
from configs.shared import comparisons


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, and `runlocal` (no data, a minute)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", runlocal=False)
  config = comparisons.comparison(options.of, "runlocal" if options.runlocal else None)
  config.name = config.name.replace("compare_", "table5_")
  config.table.seeds = (0,)
  config.comparison.tables = ("main",)
  config.comparison.averages = (4.0, 6.0)
  config.comparison.methods = (
    *("flexiq", "uniform", "quantune", "clado", "hawq"),
    *("ptmq", "robustquant", "anyprecision"),
  )
  return config
