"""FlexiQ beside CLADO, HAWQ-v3, MPQCO and QuantuneV2 at average 4, 5, 6 and 7 bits, on CIFAR-10.

The post-training part of FlexiQ's comparison (EuroSys 2026, Table 5), whose numbers per model are
not public, and CLADO's own experiment (weights of 2, 4 and 8 bits over a range of sizes). Weights
and images come from $FLEXIQ_DATA; flexiq_jax/methods/__init__.py says what
the methods are, experiments/compare.py what the columns.

    python run.py --config=configs/compare_cifar10.py
    python run.py --config=configs/compare_cifar10.py:of=resnet56_cifar10

ResNet-20, float top-1 91.7 %. On two busy CPU cores 25 minutes a seed for the main table, 9
for 8 bits and floating point, and over an hour for one of CLADO's own;
`--config.comparison.tables="('main',)"` runs some of them.
"""

from configs import common
from configs.shared import comparisons


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, and `runlocal` (no data, a minute)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", runlocal=False)
  return comparisons.comparison(options.of, "runlocal" if options.runlocal else None)
