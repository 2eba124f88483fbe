r"""MobileNetV2 with torchvision's float weights (published top-1 on ImageNet: 71.88 %).

Depthwise convolutions stay 8-bit and outside of the ratio. Weights and images come from
$FLEXIQ_DATA: calibrated on one photograph of each ImageNet class, evaluated on 500 other
photographs. `--config.weights=hf:timm/mobilenetv2_100.ra_in1k` takes timm's weights.

    python run.py --config=configs/mobilenet_v2.py
    python run.py --config=configs/mobilenet_v2.py:imagenet --config.data.root=TFDS \
        --config.calibration.root=TFDS

Float top-1 84.6 % on the 500 photographs.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/mobilenet_v2/mobilenet_v2.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `imagenet` (evaluate on ImageNet-2012)."""
  return common.mobile("mobilenet_v2", "mobilenet_v2", WEIGHTS, arg)
