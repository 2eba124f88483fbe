"""ResNet-44 on CIFAR-10; everything else as in resnet20_cifar10.py.

    python run.py --config=configs/resnet44_cifar10.py

Trained from scratch, because $FLEXIQ_DATA holds no weights of it; not for a CPU. He et al. (2016,
table 6) report a top-1 of 92.83 %.
"""

from configs import resnet20_cifar10


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  config = resnet20_cifar10.get_config(arg)
  config.model = "resnet44"
  if config.weights != "random":
    config.weights = "train"
  return config
