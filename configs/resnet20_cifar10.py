"""ResNet-20 on CIFAR-10, post-training: the accuracy curve with uniform INT8 and INT4 beside it.

Stands in for the CIFAR rows of FlexiQ's accuracy table (EuroSys 2026, Table 2), whose numbers are
not public. Pretrained weights and images come from $FLEXIQ_DATA; `--config.weights=train` trains
from scratch instead (hours on a CPU), `--config.data.root=` reads tensorflow-datasets.

    python run.py --config=configs/resnet20_cifar10.py
    python run.py --config=configs/resnet20_cifar10.py --config.model=resnet56

Float top-1 91.7 %. Half an hour on two CPU cores for all rows.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  options = common.parse_arg(arg, runlocal=False)
  config = common.flexiq("cifar10", "resnet20")
  config.weights = "$FLEXIQ_DATA/cifar10_resnets/cifar10_{model}.safetensors"
  config.data.name = config.calibration.name = "cifar10"
  config.data.root = config.calibration.root = "$FLEXIQ_DATA/cifar10"
  config.batch_size = 500
  config.calibration.batch_size = 128
  config.variants = common.VARIANTS
  if options.runlocal:
    common.runlocal(config)
  return config
