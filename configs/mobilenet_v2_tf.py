r"""MobileNetV2 with Google's TensorFlow weights (batch norm folded, 8-bit grid per channel).

Depthwise convolutions stay 8-bit and outside of the ratio. Weights and images come from
$FLEXIQ_DATA: calibrated on one photograph of each ImageNet class, evaluated on 500 other
photographs. configs/mobilenet_v2.py starts from float weights.

    python run.py --config=configs/mobilenet_v2_tf.py
    python run.py --config=configs/mobilenet_v2_tf.py:imagenet --config.data.root=TFDS \
        --config.calibration.root=TFDS

Float top-1 76.8 % on the 500 photographs.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/mobilenetv2_int8/mobilenetv2_1.0_224_bnfolded_int8.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `imagenet` (evaluate on ImageNet-2012)."""
  return common.mobile("mobilenet_v2_tf", "mobilenet_v2_tf", WEIGHTS, arg)
