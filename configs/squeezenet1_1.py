r"""SqueezeNet 1.1 on ImageNet-1k, post-training: accuracy curve, with uniform INT8 and INT4.

As configs/squeezenet1_0.py, which says where the weights come from; 1.1 takes fewer MACs.

    python run.py --config=configs/squeezenet1_1.py \
        --config.data.root=TFDS --config.calibration.root=TFDS
    python run.py --config=configs/squeezenet1_1.py:folder     # 500 photographs

The weights' published top-1 is 58.18 % (torchvision's model table).
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/squeezenet/squeezenet1_1.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `folder` (see `common.imagenet`)."""
  return common.imagenet("squeezenet1_1", "squeezenet1_1", WEIGHTS, arg)
