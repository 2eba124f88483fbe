r"""VGG-16 on ImageNet-1k, post-training: accuracy curve, with uniform INT8 and INT4 beside it.

One of the five networks of QuantuneV2 (arXiv 2501.07161), whose numbers per model are not public;
`--config.model=vgg16_bn --config.weights=hf:timm/vgg16_bn.tv_in1k` has batch norm. Weights come
from the Hugging Face hub, images from tensorflow-datasets (see docs/data.md).

    python run.py --config=configs/vgg16.py \
        --config.data.root=TFDS --config.calibration.root=TFDS
    python run.py --config=configs/vgg16.py:folder     # 500 photographs
    python run.py --config=configs/vgg16.py:runlocal

The weights' published top-1 is 71.59 % (torchvision's model table). An accelerator is advised: each
row evaluates 50,000 images, at 15.5 G MACs each.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `folder` (see `common.imagenet`)."""
  return common.imagenet("vgg16", "vgg16", "hf:timm/vgg16.tv_in1k", arg)
