"""Top-1 over the 4-bit ratio of ImageNet and CIFAR-10 models (Table 2 of FlexiQ).

FlexiQ's accuracy table (EuroSys 2026, Table 2) has eleven models; its numbers per model are not
public, nor is which the eleventh is, so all of the families that it names are here. Post-training
with the searched order; distilled with 1,000 training images; finetuned on the training set. One
cell is one model, one way of training, one seed. Models whose weights or images are not here stay
in the table with the reason.

    python run.py --config=configs/table2.py --dry_run
    python run.py --config=configs/table2.py --config.only="ptq-seed0"     # nothing trained
    python run.py --config=configs/table2.py:folder       # ImageNet models on 500 photographs
    python run.py --config=configs/table2.py:runlocal     # all of it in small, offline
    python run.py --config=configs/table2.py --config.executor=slurm --config.slurm.partition=gpu

Expected: float top-1 as the weights' sources publish it (each model's config says it); ours at
lower bits stand in docs/results.md. Estimates for two free CPU cores: 6 to 35 minutes for a
CIFAR-10 or mobile model post-training, four times that distilled. Finetuning, and 50,000 images for
each row of an ImageNet model, want a GPU: an hour or more a cell.
"""

from configs import common
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

# Name -> config, what it is called, how many minutes it takes post-training on two CPU cores.
_CIFAR10 = {
  "resnet20": ("resnet20_cifar10", "ResNet-20", 6.0),
  "resnet32": ("resnet32_cifar10", "ResNet-32", 9.0),
  "resnet44": ("resnet44_cifar10", "ResNet-44", 12.0),
  "resnet56": ("resnet56_cifar10", "ResNet-56", 15.0),
  "vit_cifar10": ("vit_cifar10", "ViT (3.6 M)", 8.0),
}
_MOBILE = {
  "efficientnet_lite0": ("efficientnet_lite0", "EfficientNet-Lite0", 35.0),
  "mobilenet_v2": ("mobilenet_v2", "MobileNetV2", 25.0),
  "mobilenet_v2_int8": ("mobilenet_v2_tf", "MobileNetV2, 8-bit weights", 25.0),
}
_IMAGENET = {
  "resnet18": ("resnet18", "ResNet-18"),
  "resnet34": ("resnet34", "ResNet-34"),
  "resnet50": ("resnet50", "ResNet-50"),
  "vit_s": ("vit_s", "ViT-S"),
  "vit_b": ("vit_b", "ViT-B"),
  "deit_ti": ("deit_ti", "DeiT-Ti"),
  "deit_s": ("deit_s", "DeiT-S"),
  "deit_b": ("deit_b", "DeiT-B"),
  "swin_t": ("swin_t", "Swin-T"),
  "swin_s": ("swin_s", "Swin-S"),
  "swin_b": ("swin_b", "Swin-B"),
}
# How weights come about -> fields, the method's name, times the minutes.
_WAYS = {
  "ptq": ((), "flexiq_gram", 1.0),
  "distilled": ((("tune", ("distill",)), ("tune_int4", True)), "flexiq_distilled", 4.0),
  "finetuned": ((("tune", ("finetune",)), ("tune_int4", True)), "flexiq_finetuned", 20.0),
}
_FIELDS = (("variants", ()), ("compare", ("greedy",)), ("random_seeds", (0,)))


def get_config(arg=None):
  """Returns the config.

  Args:
    arg: `folder` takes photographs in place of ImageNet-2012; `runlocal` takes the small variants
      of all models with random weights, nothing trained: no data, a minute a cell.
  """
  options = common.parse_arg(arg, folder=False, runlocal=False)
  ways = {"ptq": _WAYS["ptq"]} if options.runlocal else _WAYS
  bases, models = {}, {**_CIFAR10, **_MOBILE, **_IMAGENET}
  for name, (file, _, *minutes) in models.items():
    here = minutes or options.folder or options.runlocal
    argument = ":folder" if options.folder and not minutes else ""
    argument = ":runlocal" if options.runlocal else argument
    for way, (fields, _, times) in ways.items():
      bases[f"{name}-{way}"] = sweeps.base(
        f"configs/{file}.py{argument}",
        fields=(*_FIELDS, *fields),
        labels=(("network", name), ("training", way)),
        minutes=times * minutes[0] if minutes else 60.0,
        memory=3.0 if minutes else 8.0,
        gpus=int(way == "finetuned" or not here),
      )
  tables = {}
  for way, (_, method, _) in ways.items():
    done = "" if way == "ptq" else f"_{way}"
    tables[way] = Layout(
      title="model",
      rows=tuple(
        (title, f"network={name},training={way}") for name, (_, title, *_) in models.items()
      ),
      columns=(
        ("images", "method=float", "images"),
        ("float", "method=float"),
        ("INT8", "method=uniform_int8"),
        *((f"{100 * r:g} %", f"method={method},ratio={r}") for r in (0.25, 0.5, 0.75)),
        ("100 % 4-bit", f"method={method},ratio=1"),
        ("INT4", f"method=uniform_int4{done}"),
        *(() if done else (("greedy, 50 %", "method=flexiq_greedy,ratio=0.5"),)),
      ),
    )
  name = "table2" + "_folder" * options.folder + "_runlocal" * options.runlocal
  return sweeps.sweep(name, bases, tables=tables)
