"""Cycles of all models on an NPU's systolic array by 4-bit ratio, and the arrays where 4 bits pay.

FlexiQ's NPU extends DNNWeaver's array; of its figures only the switch is known (below 0.3 µs, by a
third-party note). This is a cycle model (`flexiq_jax/serving/npu.py`): no NPU ran. A ratio is the
share of each selectable layer's channels; depthwise layers and attention's own products run
elsewhere.

    python run.py --config=configs/npu.py
    python run.py --config=configs/npu.py:of=deit_s --config.npu.rows=32

A minute on one CPU core. On 64 x 64 cells 4 bits everywhere take ResNet-18 at a batch of 16 to
about 150 % of INT8's speed with two weights a cell, to 195 % with four.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG` (for the table of layers), `runlocal` (seconds)."""
  options = common.parse_arg(arg, of="resnet18", runlocal=False)
  config = common.of_other("npu", options.of, options.runlocal)
  config.npu = config_dict.create(
    models=(
      *("resnet20", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "efficientnet_lite0"),
      *("vit_s", "vit_b", "deit_ti", "deit_s", "deit_b", "swin_t", "swin_s", "swin_b"),
    ),
    # See `npu.Array`; weights of 4 bits that a cell holds, and examples in a batch.
    rows=64,
    columns=64,
    factors=(2, 4),
    batches=(1, 16),
    bandwidth=32.0,
    buffer=512 * 1024,
    low_bytes=0.5,
    serial=True,
    clock=2e8,
    # Arrays of the second table, for the config's model.
    shapes=(
      *((16, 16), (32, 32), (64, 32), (32, 64), (64, 64), (128, 32), (128, 64), (128, 128)),
      *((256, 64), (256, 256), (512, 64), (1024, 64)),
    ),
    # Below this gain 4 bits do not pay.
    least=1.05,
  )
  if options.runlocal:
    config.npu.update(models=("resnet8",), batches=(1,), shapes=((16, 16), (256, 16)))
  return config
