r"""SqueezeNet 1.1 on ImageNet-1k, post-training: accuracy curve, with uniform INT8 and INT4.

One of the five networks of QuantuneV2 (arXiv 2501.07161), whose numbers per model are not public.
No hub has torchvision's weights as safetensors; where there is torch, this writes them:

    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    save_file(squeezenet1_1(weights="IMAGENET1K_V1").state_dict(), "squeezenet1_1.safetensors")

    python run.py --config=configs/squeezenet1_1.py \
        --config.data.root=TFDS --config.calibration.root=TFDS
    python run.py --config=configs/squeezenet1_1.py:folder     # 500 photographs
    python run.py --config=configs/squeezenet1_1.py:runlocal

The weights' published top-1 is 58.18 % (torchvision's model table). An accelerator is advised: each
row evaluates 50,000 images.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/squeezenet/squeezenet1_1.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `folder` (see `common.imagenet`)."""
  return common.imagenet("squeezenet1_1", "squeezenet1_1", WEIGHTS, arg)
