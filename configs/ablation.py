"""What each part is worth at 75 % 4-bit: the rows of FlexiQ's ablation (EuroSys 2026, Table 7).

The paper's own numbers per model are not public; its text gives average gains. Weights and images
come from $FLEXIQ_DATA; `of` names the config whose model is taken apart.

    python run.py --config=configs/ablation.py
    python run.py --config=configs/ablation.py:of=efficientnet_lite0
    python run.py --config=configs/ablation.py:of=vit_cifar10

ResNet-20: minutes a seed on two CPU cores, top-1 at 75 % between 89 and 92 %.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, and `runlocal` (no data, seconds)."""
  options = common.parse_arg(arg, of="resnet20_cifar10", runlocal=False)
  config = common.of_other("ablation", options.of, options.runlocal)
  config.experiment = "table"
  config.table = config_dict.create(job="ablation", seeds=(0, 1, 2))
  config.ablation = config_dict.create(
    methods=(
      *("random_naive", "random_range", "random_mse", "random"),
      *("greedy", "evolution", "gram", "gram_dynamic"),
    ),
    ratios=(0.25, 0.5, 0.75, 1.0),
    random_ratios=(0.75,),
    # Training images that calibrate nothing, on which the searches are compared as well.
    held_out=1000,
  )
  if config.data.name == "folder":  # 1,000 training photographs in all
    config.ablation.held_out = 384
  if options.runlocal:
    config.table.seeds = (0, 1)
    config.ablation.update(ratios=(0.5,), random_ratios=(0.5,), held_out=64)
    config.search.generations = 2
    config.search.population = 8
  return config
