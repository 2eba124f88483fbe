"""ResNet-20 on CIFAR-10, post-training: the accuracy curve with uniform INT8 and INT4 beside it.

Stands in for the CIFAR rows of FlexiQ's accuracy table (EuroSys 2026, Table 2), whose numbers are
not public. Pretrained weights and images come from $FLEXIQ_DATA; `--config.weights=train` trains
from scratch instead (hours on a CPU), `--config.data.root=` reads tensorflow-datasets.

    python run.py --config=configs/resnet20_cifar10.py
    python run.py --config=configs/resnet20_cifar10.py --config.model=resnet56

Float top-1 91.7 %. On two CPU cores six minutes for the rows, and about one for the search.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/cifar10_resnets/cifar10_{model}.safetensors"


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  return common.cifar10("cifar10", "resnet20", WEIGHTS, arg)
