"""CLADO's own experiment: 2, 4 or 8-bit weights of each layer over a range of sizes, three seeds.

Deng et al., Mixed-precision quantization with cross-layer dependencies (arXiv 2307.05657): integer
programs with and without cross terms between layers, at sizes relative to 8 bits. Its numbers are
of ImageNet models and stand in that paper; here the experiment runs on ResNet-20 and CIFAR-10. One
cell is one seed of `configs/compare_cifar10.py` with the table `clado_tensor`.

    python run.py --config=configs/clado.py

Ours, mean of three seeds: with cross terms 28.5, 63.6, 78.1, 89.3 and 91.4 % at 31 to 75 % of the
size, without them 15.3, 35.9, 78.0, 89.4 and 90.9 % (docs/comparison.md). More than an hour
a cell on two CPU cores.
"""

from configs import common
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

_METHODS = {
  "clado": "CLADO",
  "clado_block": "in blocks",
  "clado_diagonal": "diagonal",
  "mpqco": "MPQCO",
  "random": "random",
}
_SIZES = (0.3125, 0.375, 0.4375, 0.5, 0.75)


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes a minute a cell."""
  options = common.parse_arg(arg, runlocal=False)
  small = options.runlocal
  file = "configs/compare_cifar10.py:of=resnet20_cifar10" + (",runlocal" if small else "")
  sizes = (0.5,) if small else _SIZES
  fields = (
    ("experiment", "compare"),
    ("comparison.tables", ("clado_tensor",)),
    ("comparison.methods", tuple(_METHODS)),
  )
  layout = Layout(
    title="size",
    rows=tuple((f"{size:.0%}".replace("%", " %"), f"ratio={size}") for size in sizes),
    columns=tuple((title, f"method=clado_tensor/{name}") for name, title in _METHODS.items()),
    digits=1,
  )
  return sweeps.sweep(
    "clado" + ("_runlocal" if small else ""),
    {"resnet20": sweeps.base(file, fields=fields, minutes=1.0 if small else 75.0, memory=3.0)},
    seeds=(0,) if small else (0, 1, 2),
    tables={"sizes": layout},
  )
