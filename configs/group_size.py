"""Accuracy over the group size, 1 to 64 channels: what a kernel can afford against what it costs.

Channels of a group share their 4-bit range and go to 4 bits together: small groups are accurate,
large ones are what kernels read at once (docs/kernels.md says which sizes ours take). One cell is
one model, one size, one seed. The last two columns are what the TPU kernel makes of a size where
each group has its own shifts, from the layers' shapes (`flexiq_jax.deployment.padded`): rows of K
that it multiplies, and bytes of weights, relative to 8 bits without padding. A product in 4 bits
takes half as long, so a size pays where its rows are below 2; `config.groups.shift_block` lets
small groups share a block.

    python run.py --config=configs/group_size.py
    python run.py --config=configs/group_size.py --config.only=vit --config.sweep.seeds="(0,1,2)"

Expected numbers: not public. About five minutes a cell on two free CPU cores, an hour and a
quarter in all; no GPU is needed.
"""

from configs import common
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

SIZES = (1, 2, 4, 8, 16, 32, 64)
_MODELS = {
  "resnet20": ("resnet20_cifar10", "ResNet-20"),
  "vit_cifar10": ("vit_cifar10", "ViT (3.6 M)"),
}
_FIELDS = (("variants", ()), ("compare", ()), ("random_seeds", ()))


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds a cell."""
  options = common.parse_arg(arg, runlocal=False)
  small = ":runlocal" if options.runlocal else ""
  minutes = 0.5 if small else 5.0
  sizes = (2, 4) if small else SIZES
  bases = {
    name: sweeps.base(f"configs/{file}.py{small}", fields=_FIELDS, minutes=minutes, memory=2.0)
    for name, (file, _) in _MODELS.items()
  }
  rows = tuple(
    (f"{title}, {size}", f"base={name},groups.group_size={size}")
    for name, (_, title) in _MODELS.items()
    for size in sizes
  )
  ratios = ((f"{100 * r:g} %", f"method=flexiq_gram,ratio={r}") for r in (0.25, 0.5, 0.75, 1.0))
  layout = Layout(
    title="model, group size",
    rows=rows,
    columns=(
      ("INT8", "method=uniform_int8"),
      *ratios,
      ("INT4", "method=uniform_int4"),
      ("kernel's rows", "method=float", "kernel_rows"),
      ("kernel's bytes", "method=float", "kernel_bytes"),
    ),
  )
  return sweeps.sweep(
    "group_size" + small.replace(":", "_"),
    bases,
    axes=(("groups.group_size", sizes),),
    computed=("kernel_rows", "kernel_bytes"),
    tables={"group_size": layout},
  )
