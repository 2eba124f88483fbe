"""FlexiQ beside the layer-wise methods on ImageNet-2012, or on labelled photographs.

As configs/compare_cifar10.py. CLADO's pairs take hours on models of this size: the cost is printed
before it starts, and a stopped run goes on where it was.

    python run.py --config=configs/compare_imagenet.py
    python run.py --config=configs/compare_imagenet.py:of=resnet50,variant=folder
    python run.py --config=configs/compare_imagenet.py:of=efficientnet_lite0

The first takes ResNet-18 and ImageNet from tensorflow-datasets; its published float top-1 is
69.76 %. `variant` is the argument of the config that `of` names.
"""

from configs import common
from configs.shared import comparisons


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, `variant=ITS_ARGUMENT`, `runlocal`."""
  options = common.parse_arg(arg, of="resnet18", variant="", runlocal=False)
  return comparisons.comparison(options.of, "runlocal" if options.runlocal else options.variant)
