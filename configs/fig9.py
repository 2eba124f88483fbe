"""A load that moves, served by controllers: FlexiQ's Fig. 9 (EuroSys 2026), simulated.

Requests follow a trace that is scaled to peak above what INT8 sustains: arrivals, ratio, median
latency and accuracy over time for FlexiQ's controllers, INT8, INT4, two models that are swapped,
and an oracle. A third-party note has the paper's figures: median 100 to 150 ms, INT8 up to 660 ms,
mean accuracy 84.64 % against INT8's 84.72 %; its controller is not described, ours is our own.

    python run.py --config=configs/fig9.py
    python run.py --config=configs/fig9.py --config.serving.accuracy=runs/... \
        --config.fig9.trace='$FLEXIQ_DATA/traces/twitter_bursty_1260s.csv'

A minute on one CPU core. FlexiQ's median stays below 1.2 times INT4's, and all requests are within
the target of 300 ms, of INT8's about 50 %.
"""

from ml_collections import config_dict

from configs import common
from configs.shared import serving


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, and `runlocal` (seconds, no data)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", runlocal=False)
  config = serving.simulated("fig9", options.of, options.runlocal)
  config.fig9 = config_dict.create(
    # `trace` (requests a second from a file), `bursts` (two rates, low and high) or `gamma` (at the
    # middle of low and high, gaps with the given coefficient of variation).
    arrivals="trace",
    trace="$FLEXIQ_DATA/traces/twitter_fluctuating_600s.csv",
    # Seconds that a trace is stretched to (0: its own), and the span of other arrivals.
    seconds=0.0,
    cv=3.0,
    # Quietest and loudest rate as shares of what INT8 sustains. The paper's trace runs from 500 to
    # 1,500 a second; what its INT8 model sustains is not known.
    low=0.4,
    high=1.2,
    systems=("load", "predictive", "int8", "int4", "swapping", "oracle"),
    # Of `swapping`, seconds to load a model; of `layerwise`, the part of it that plans differ in.
    load_s=0.5,
    share=0.25,
    # Workdir or results.csv of a finished comparison (configs/compare_cifar10.py), and which of
    # its layer-wise methods, for `layerwise`.
    layerwise="",
    layerwise_method="hawq",
    # Seconds that a point of the curves over time stands for.
    bin=5.0,
  )
  if options.runlocal:
    config.fig9.update(arrivals="bursts", seconds=20.0, bin=1.0)
  return config
