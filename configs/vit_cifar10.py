"""A small vision transformer (3.6 M parameters, 65 tokens) on CIFAR-10, post-training.

The transformer that can be measured in full on a CPU. Weights and images come from $FLEXIQ_DATA.

    python run.py --config=configs/vit_cifar10.py

Float top-1 74.2 %: the network was trained for a few epochs only, to be quantized.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds."""
  options = common.parse_arg(arg, runlocal=False)
  config = common.flexiq("vit_cifar10", "vit_cifar10")
  config.weights = "$FLEXIQ_DATA/vit_cifar10/vit_cifar10.safetensors"
  config.data.name = config.calibration.name = "cifar10"
  config.data.root = config.calibration.root = "$FLEXIQ_DATA/cifar10"
  config.batch_size = 250
  config.variants = common.BRIEF
  config.random_seeds = (0,)
  if options.runlocal:
    common.runlocal(config)
  return config
