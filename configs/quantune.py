"""QuantuneV2's five models: whole layers at 4 or 8 bits, and at 8 bits or in floating point.

Kim et al., QuantuneV2: compiler-based local metric-driven mixed precision quantization (arXiv
2501.07161), on ResNet-18, ResNet-50, SqueezeNet, VGG and MobileNetV2. Which VGG and which
SqueezeNet it took is not public: here VGG-16 and SqueezeNet 1.0 and 1.1. A cell is one model and
one seed of the comparison (configs/compare_imagenet.py): QuantuneV2 beside uniform bits, random
layers and FlexiQ at equal average bits, all on the same calibration images; and QuantuneV2 beside
random layers where a share of the MACs has 8 bits and the rest stays float, as compilers offer it.

    python run.py --config=configs/quantune.py --dry_run
    python run.py --config=configs/quantune.py:folder      # 500 photographs, no ImageNet
    python run.py --config=configs/quantune.py:runlocal    # tiny, random weights, offline

Expected: numbers per model are not public; the abstract claims up to 10.28 % more accuracy and
12.52 % more speed than methods before it. Speed is not measured here; `changes` counts the places
where neighbours differ in precision, each of which costs a conversion. Published float top-1:
69.76 % (ResNet-18), 76.13 % (ResNet-50), 58.09 % and 58.18 % (SqueezeNet 1.0 and 1.1), 71.59 %
(VGG-16), 71.88 % (MobileNetV2). A GPU is advised for 50,000 images: an hour a cell. On the
photographs half an hour to an hour and a half a cell on two CPU cores, VGG-16 three; MobileNetV2's
weights are in $FLEXIQ_DATA, VGG-16's and the ResNets' on the hub, SqueezeNet's to be converted
(configs/squeezenet1_0.py says how).
"""

from configs import common
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

# Name -> what it is called, minutes on the photographs.
_MODELS = {
  "resnet18": ("ResNet-18", 40.0),
  "resnet50": ("ResNet-50", 90.0),
  "squeezenet1_0": ("SqueezeNet 1.0", 30.0),
  "squeezenet1_1": ("SqueezeNet 1.1", 30.0),
  "vgg16": ("VGG-16", 180.0),
  "mobilenet_v2": ("MobileNetV2", 30.0),
}
_METHODS = {
  "uniform": "uniform",
  "random": "random layers",
  "quantune": "QuantuneV2",
  "flexiq": "FlexiQ",
}
_AVERAGES, _SHARES = (5.0, 6.0, 7.0), (0.5, 0.75, 1.0)


def get_config(arg=None):
  """Returns the config.

  Args:
    arg: `folder` takes photographs in place of ImageNet-2012; `runlocal` takes the small variants
      of all models with random weights: no data, a minute a cell.
  """
  options = common.parse_arg(arg, folder=False, runlocal=False)
  small = options.runlocal
  averages, shares = ((6.0,), (0.5, 1.0)) if small else (_AVERAGES, _SHARES)
  fields = (
    ("experiment", "compare"),
    ("comparison.tables", ("main", "float8")),
    ("comparison.methods", tuple(_METHODS)),
    ("comparison.averages", averages),
    ("comparison.int8_shares", shares),
  )
  bases = {}
  for name, (_, minutes) in _MODELS.items():
    # The config of MobileNetV2 takes the photographs unless told otherwise.
    usual, other = ("imagenet", "") if name == "mobilenet_v2" else ("", "folder")
    variant = other if options.folder else usual
    argument = ",runlocal" if small else f",variant={variant}" if variant else ""
    bases[name] = sweeps.base(
      f"configs/compare_imagenet.py:of={name}{argument}",
      fields=fields,
      labels=(("network", name),),
      minutes=2.0 if small else minutes if options.folder else 60.0,
      memory=2.0 if small else 16.0 if name == "vgg16" else 8.0,
      gpus=int(not options.folder and not small),
    )
  rows = tuple((title, f"network={name}") for name, (title, _) in _MODELS.items())
  float_ = (("images", "method=float", "images"), ("float", "method=float"))
  tables = {}
  for bits in averages:
    of = lambda method, bits=bits: f"method={method},ratio={(8 - bits) / 4}"
    tables[f"bits{bits:g}"] = Layout(
      title=f"average of {bits:g} bits",
      rows=rows,
      columns=(
        *float_,
        *((title, of(method)) for method, title in _METHODS.items()),
        ("changes", of("quantune"), "boundaries"),
      ),
    )
  tables["float8"] = Layout(
    title="share in 8 bits",
    rows=rows,
    columns=(
      *float_,
      *(
        (f"{_METHODS[method]}, {100 * share:g} %", f"method=float8/{method},ratio={share}")
        for share in shares[:-1]
        for method in ("random", "quantune")
      ),
      ("100 %", f"method=float8/quantune,ratio={shares[-1]}"),
    ),
  )
  name = "quantune" + "_folder" * options.folder + "_runlocal" * small
  return sweeps.sweep(name, bases, tables=tables)
