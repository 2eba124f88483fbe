"""ResNet-56 on CIFAR-10; everything else as in resnet20_cifar10.py.

    python run.py --config=configs/resnet56_cifar10.py

Float top-1 93.4 %.
"""

from configs import resnet20_cifar10


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  config = resnet20_cifar10.get_config(arg)
  config.model = "resnet56"
  config.distill.update(steps=800, refit=200)  # a step takes three times as long as ResNet-20's
  return config
