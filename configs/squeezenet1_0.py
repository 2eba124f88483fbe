r"""SqueezeNet 1.0 on ImageNet-1k, post-training: accuracy curve, with uniform INT8 and INT4.

One of the five networks of QuantuneV2 (arXiv 2501.07161), whose numbers per model are not public.
No hub has torchvision's weights as safetensors; where there is torch, this writes them:

    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_0

    save_file(squeezenet1_0(weights="IMAGENET1K_V1").state_dict(), "squeezenet1_0.safetensors")

    python run.py --config=configs/squeezenet1_0.py \
        --config.data.root=TFDS --config.calibration.root=TFDS
    python run.py --config=configs/squeezenet1_0.py:folder     # 500 photographs
    python run.py --config=configs/squeezenet1_0.py:runlocal

The weights' published top-1 is 58.09 % (torchvision's model table). An accelerator is advised: each
row evaluates 50,000 images.
"""

from configs import common

WEIGHTS = "$FLEXIQ_DATA/squeezenet/squeezenet1_0.safetensors"


def get_config(arg=None):
  """Returns the config; arguments: `runlocal`, `folder` (see `common.imagenet`)."""
  return common.imagenet("squeezenet1_0", "squeezenet1_0", WEIGHTS, arg)
