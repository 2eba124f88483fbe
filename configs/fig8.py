"""Latency against request rate at each 4-bit ratio: FlexiQ's Fig. 8 (EuroSys 2026), simulated.

Poisson arrivals. Median and p90 at each ratio, and the rate that each sustains within the p90 limit
beside that of INT8. The paper's figures are not public; a third-party note says that 100 % sustains
1.57 times INT8's rate at a similar p90, and that its kernel runs 1.43 times as fast. By default
latencies are modelled with that 1.43; `serving.profile` takes those of a device.

    python run.py --config=configs/fig8.py
    python run.py --config=configs/fig8.py --config.serving.profile=profile.json

Half a minute on one CPU core. With the modelled gain 100 % sustains about 140 % of INT8's rate.
"""

from ml_collections import config_dict

from configs import common
from configs.shared import serving


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, and `runlocal` (seconds)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", runlocal=False)
  config = serving.simulated("fig8", options.of, options.runlocal)
  config.fig8 = config_dict.create(
    # Request rates as shares of what INT8 sustains at most, and the seconds of each run.
    rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    seconds=120.0,
    # Share of the rate to which a sustained rate is found.
    precision=0.005,
  )
  if options.runlocal:
    config.fig8.update(rates=(0.3, 0.9, 1.3), seconds=4.0, precision=0.05)
  return config
