"""A small vision transformer (3.6 M parameters, 65 tokens) on CIFAR-10, post-training.

The transformer that can be measured in full on a CPU. Weights and images come from $FLEXIQ_DATA.

    python run.py --config=configs/vit_cifar10.py

Float top-1 74.2 %: the network was trained for a few epochs only, to be quantized.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/vit_cifar10/vit_cifar10.safetensors"


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  config = common.cifar10("vit_cifar10", "vit_cifar10", WEIGHTS, arg)
  if config.variants:
    config.variants = common.BRIEF
  config.random_seeds = (0,)
  config.distill.update(steps=400, refit=200, every=50)  # seconds a step
  return config
