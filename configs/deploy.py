"""Deploys a recipe and compares it with the simulation that the recipe was found with.

Packed 8-bit and 4-bit codes, an artifact on disk, one executable whose ratio is a number: top-1 of
both at every level, bytes, layers that gather, cost of a switch. The paper's own figures of this
kind are of its CUDA kernel. `of` names the config whose model is deployed; with
`--config.recipe=RUN/recipe.json` a finished run's recipe is, else the run finds one. `block` is the
shift block in channels.

    python run.py --config=configs/deploy.py
    python run.py --config=configs/deploy.py:of=vit_cifar10,block=64
    python run.py --config=configs/deploy.py:of=efficientnet_lite0,block=16

ResNet-20: minutes on two CPU cores; top-1 at 100 % within 1 of 1,000 images of the simulation.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, `block=CHANNELS`, and `runlocal` (no data)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", block=16, runlocal=False)
  config = common.of_other("deploy", options.of, options.runlocal)
  config.groups.shift_block = options.block
  config.groups.whole_heads = True
  config.variants = ()
  # granule: rows of K that shift blocks are padded to; 128 for a TPU.
  # tuning: folder of tiles that were measured on the device; "" takes the project's own for it,
  # where there are any, else tiles by rule.
  # tune: measure those of this model's products first, on a TPU or a Hopper GPU.
  config.deploy = config_dict.create(granule=2, switches=10_000, tuning="", tune=False)
  if options.runlocal:
    config.deploy.switches = 100
  return config
