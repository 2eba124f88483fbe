"""Latency of layers and models by 4-bit ratio on each device, and which resource binds.

FlexiQ's tables of this kind (EuroSys 2026) are not public. Each row says where it is from: the
roofline of a described device and the cycles of an NPU are modelled; estimates of the kernels'
schedules come from `benchmarks/kernels.py --json`, measured ones from profiles or from an artifact
that is timed here. A ratio is the share of each selectable layer's channels.

    python run.py --config=configs/latency.py
    python run.py --config=configs/latency.py:of=deit_s
    python run.py --config=configs/latency.py:of=digits --config.latency.artifact=runs/.../artifact

Seconds on one CPU core; nothing is downloaded. At a batch of 1 bytes bind nearly everywhere, and
100 % gains 1.4 to 1.6 on TPUs; at 128 ViT-B on v5e gains 1.6, DeiT-S, whose results bind, 1.2.
"""

from ml_collections import config_dict

from configs import common
from flexiq_jax.serving import latency, npu


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG` (for the table of layers), `runlocal` (seconds)."""
  options = common.parse_arg(arg, of="resnet18", runlocal=False)
  config = common.of_other("latency", options.of, options.runlocal)
  config.latency = config_dict.create(
    models=("resnet18", "resnet50", "deit_s", "vit_b"),
    # Of flexiq_jax/serving/latency.py; `npu` is the array below.
    devices=(*latency.DEVICES, "npu"),
    batches=(1, 16, 128),
    # See `npu.Array`.
    array=common.settings(npu.Array()),
    # Files, "" or () for none: profiles (of any model and device), and what benchmarks/kernels.py
    # wrote of its schedules.
    profiles=(),
    schedules="",
    # Folder of an artifact of the config's model, which is timed here, `repeats` batches each.
    artifact="",
    repeats=20,
  )
  if options.runlocal:
    config.latency.update(models=("resnet8",), devices=("v5e", "h100", "npu"), batches=(1, 4))
  return config
