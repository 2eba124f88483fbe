r"""Swin-S on ImageNet-1k, post-training: accuracy curve, with uniform INT8 and INT4 beside it.

One row of FlexiQ's accuracy table (EuroSys 2026, Table 2), whose numbers are not public. Weights
come from the Hugging Face hub, images from tensorflow-datasets (see README, "ImageNet").

    python run.py --config=configs/swin_s.py \
        --config.data.root=TFDS --config.calibration.root=TFDS
    python run.py --config=configs/swin_s.py:runlocal

The weights' published top-1 is 83.2 % (model tables of torchvision and timm). An accelerator is
advised: each row evaluates 50,000 images.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `folder` (see `common.imagenet`)."""
  return common.imagenet("swin_s", "swin_s", "hf:timm/swin_small_patch4_window7_224.ms_in1k", arg)
