r"""EfficientNet-Lite0 with Google's TensorFlow weights: a hard case for low bits.

Depthwise convolutions stay 8-bit and outside of the ratio. Weights and images come from
$FLEXIQ_DATA: calibrated on one photograph of each ImageNet class, evaluated on 500 other
photographs (chosen by their authors to be easy; absolute accuracy is above ImageNet's).

    python run.py --config=configs/efficientnet_lite0.py
    python run.py --config=configs/efficientnet_lite0.py:imagenet --config.data.root=TFDS \
        --config.calibration.root=TFDS

Float top-1 88.2 % on the 500 photographs; published for ImageNet's validation set: 75.1 %.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/efficientnet_lite0/efficientnet_lite0.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `imagenet` (evaluate on ImageNet-2012)."""
  return common.mobile("efficientnet_lite0", "efficientnet_lite0_tf", WEIGHTS, arg)
