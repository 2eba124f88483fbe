"""ResNet-32 on CIFAR-10; everything else as in resnet20_cifar10.py.

    python run.py --config=configs/resnet32_cifar10.py

Float top-1 92.6 %.
"""

from configs import resnet20_cifar10


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  config = resnet20_cifar10.get_config(arg)
  config.model = "resnet32"
  return config
