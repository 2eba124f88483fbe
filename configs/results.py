"""The tables of docs/ that are not among the paper's: curves, searches, comparisons, deployment.

Every one as a sweep of ordinary runs, so that it can be run again and its numbers come from files:
greedy curves and their variants (`curve`), orders by three searches (`search`), finetuned weights
(`tuned`), methods beside each other at equal bits (`compare`, `trained`), and deployed models
beside their simulation (`deploy`). Tables of benchmarks, which measure time, are not here.

    python run.py --config=configs/results.py --dry_run
    python run.py --config=configs/results.py --config.only="^curve"      # one family
    python run.py --config=configs/results.py:runlocal                    # tiny, offline

What to expect stands in docs/measurements.md, finetuning.md and comparison.md; ResNet-20 has 91.7 %
in floating point. Weights and images come from $FLEXIQ_DATA. On two free CPU cores minutes a cell
for CIFAR-10 curves, half an hour for mobile networks and searches, one to two hours for
comparisons: a day in all.
"""

from configs import common
from configs.shared import sweeps
from configs.table7 import PARTS
from flexiq_jax.runs.sweeps.layouts import Layout

# Name -> config, what it is called, minutes of a curve on two CPU cores.
_MODELS = {
  "resnet20": ("resnet20_cifar10", "ResNet-20", 6.0),
  "resnet56": ("resnet56_cifar10", "ResNet-56", 8.0),
  "vit": ("vit_cifar10", "ViT (3.6 M)", 8.0),
  "lite0": ("efficientnet_lite0", "EfficientNet-Lite0", 8.0),
  "mobilenet": ("mobilenet_v2_tf", "MobileNetV2", 8.0),
}
_ORDERS = (("greedy", "greedy"), ("evolution", "evolution"), ("gram", "gram"))
_LAYERWISE = {
  **{"flexiq_greedy": "FlexiQ, greedy", "flexiq": "FlexiQ, search", "uniform": "uniform"},
  **{"clado": "CLADO", "clado_diagonal": "CLADO, diagonal", "mpqco": "MPQCO", "hawq": "HAWQ-v3"},
  **{"quantune": "QuantuneV2", "random": "random layers"},
}
_TRAINED = {"ptmq": "PTMQ", "anyprecision": "any precision", "robustquant": "RobustQuant"}
# Steps of 32 images, on which two cores spend a minute or two.
_BUDGETS = (
  *(("comparison.ptmq.steps", 100), ("comparison.ptmq.rounding_rate", 0.03)),
  *(("comparison.robustquant.batch_size", 32), ("comparison.robustquant.steps", 480)),
  ("comparison.robustquant.learning_rate", 0.002),
  *(("comparison.anyprecision.batch_size", 32), ("comparison.anyprecision.steps", 180)),
)
_FEW = (("variants", ()), ("random_seeds", (0,)))
_RATIOS = (0.25, 0.5, 0.75, 1.0)
# Three seeds where an order is searched or compared; one elsewhere.
_ONE_SEED = r"^(?!search|compare-resnet20-main).*seed[12]$"


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes a minute a cell."""
  options = common.parse_arg(arg, runlocal=False)
  small = options.runlocal
  bases = _bases(",runlocal" if small else "", ":runlocal" if small else "", small)
  config = sweeps.sweep(
    "results" + "_runlocal" * small,
    bases,
    seeds=(0,) if small else (0, 1, 2),
    tables=_tables((0.5, 1.0) if small else _RATIOS),
  )
  config.sweep.skip = "" if small else _ONE_SEED
  return config


def _bases(more: str, only: str, small: bool) -> dict:
  """All base configs; `more` and `only` are `runlocal` after other arguments and alone."""

  def base(file, minutes, fields=(), memory=3.0):
    minutes = 1.0 if small else minutes
    return sweeps.base(f"configs/{file}", fields=fields, minutes=minutes, memory=memory)

  found = {}
  for name, (file, _, minutes) in _MODELS.items():
    fields = () if name == "resnet20" and not small else _FEW
    greedy = (("search.method", "greedy"), *fields)
    found[f"curve-{name}"] = base(f"{file}.py{only}", minutes, greedy)
  ablation = ("experiment", "ablation")
  for name, fields in {
    "vit": (("ablation.methods", ("greedy", "evolution", "gram")),),
    "lite0": (),
    "lite0_depthwise": (("select_depthwise", True), ("score", "range")),
    "mobilenet": (),
  }.items():
    file = _MODELS[name.removesuffix("_depthwise")][0]
    if name == "lite0_depthwise":
      fields += (("ablation.methods", ("greedy", "gram")),)
    found[f"search-{name}"] = base(f"ablation.py:of={file}{more}", 40.0, (ablation, *fields))
  own = (("variants", ()), ("compare", ()), ("random_seeds", (0,)))
  for name, fields in {
    "distilled": (("tune", ("reconstruct", "distill")),),
    "nearest": (("tune", ("distill",)), ("distill.reconstruct", False)),
  }.items():
    found[f"tuned-{name}"] = base(f"resnet20_cifar10.py{only}", 25.0, (*own, *fields))
  compare = ("experiment", "compare")
  for name, table, file, fields in (
    ("resnet20", "main", "compare_cifar10", ()),
    ("resnet56", "main", "compare_cifar10", (("comparison.images", 256),)),
    ("lite0", "main", "compare_imagenet", (("comparison.images", 64), ("comparison.probes", 16))),
    ("resnet20", "wide", "compare_cifar10", (("comparison.images", 256),)),
    ("resnet20", "clado_channel", "compare_cifar10", (("comparison.images", 256),)),
    ("resnet20", "float8", "compare_cifar10", ()),
  ):
    wanted = () if small else fields  # the small variant has fewer images than that
    fields = (compare, ("comparison.tables", (table,)), *wanted)
    source = f"{file}.py:of={_MODELS[name][0]}{more}"
    found[f"compare-{name}-{table}"] = base(source, 60.0, fields)
  trained = ("comparison.methods", ("uniform", *_TRAINED))
  file = "table5.py" + only
  budgets = () if small else _BUDGETS
  found["trained-resnet20"] = base(file, 10.0, (compare, trained, *budgets))
  for name, block in {"resnet20": 16, "vit": 64, "lite0": 16}.items():
    source = f"deploy.py:of={_MODELS[name][0]},block={block}{more}"
    greedy = (("search.method", "greedy"),) if name == "lite0" else ()
    found[f"deploy-{name}"] = base(source, 15.0, greedy)
  return found


def _tables(ratios: tuple[float, ...]) -> dict[str, Layout]:
  """The layouts of all tables."""
  percent = lambda method="": tuple((f"{100 * r:g} %", f"{method}ratio={r}") for r in ratios)
  inner = [r for r in ratios if r < 1]
  titles = {name: title for name, (_, title, _) in _MODELS.items()}
  searched = {**titles, "lite0_depthwise": "the same, depthwise layers, too"}
  tables = {
    "curves": Layout(
      title="model",
      rows=tuple((title, f"base=curve-{name}") for name, title in titles.items()),
      columns=(
        *(("images", "method=float", "images"), ("float", "method=float")),
        ("INT8", "method=uniform_int8"),
        *percent("method=flexiq_greedy,"),
        ("INT4", "method=uniform_int4"),
        ("random order, 50 %", "method=flexiq_random,ratio=0.5"),
      ),
    ),
    "variants": Layout(
      title="ResNet-20",
      rows=tuple(
        (title, f"base=curve-resnet20,method=flexiq_{method}")
        for method, title in (
          ("greedy", "default"),
          ("greedy_per_output", "weight shift per output channel"),
          ("greedy_dynamic", "dynamic activation shifts"),
          ("greedy_range", "`range` shifts"),
          ("greedy_uncorrected", "no bias correction"),
          ("greedy_naive", "naive top four bits, no bias correction"),
          ("random", "default, random order"),
        )
      ),
      columns=percent(),
    ),
    "parts": Layout(
      title="75 % 4-bit",
      rows=PARTS,
      columns=tuple(
        (titles[name], f"base=search-{name},ratio={inner[-1]}") for name in ("lite0", "mobilenet")
      ),
      digits=1,
    ),
    "tuned": Layout(
      title="ResNet-20",
      rows=tuple(
        (title, f"base=tuned-{name},method=flexiq_{method}")
        for title, name, method in (
          ("post-training", "distilled", "gram"),
          ("reconstructed, no training", "distilled", "reconstructed"),
          ("distilled", "distilled", "distilled"),
          ("distilled from nearest rounding", "nearest", "distilled"),
          ("post-training, random order", "distilled", "random"),
        )
      ),
      columns=(("0 %", "ratio=0"), *percent()),
    ),
    "trained": Layout(
      title="method",
      rows=tuple(
        (title, f"base=trained-resnet20,method={method}")
        for method, title in {"uniform": "uniform", **_TRAINED}.items()
      ),
      columns=(
        *(("steps", "ratio=1", "steps"), ("seconds", "ratio=1", "seconds")),
        *(("4 bits", "ratio=1"), ("6 bits", "ratio=0.5")),
      ),
    ),
    "deployed": Layout(
      title="top-1 in %",
      rows=tuple(
        (f"{titles[name]}, {method}", f"base=deploy-{name},method={method}")
        for name in ("resnet20", "vit", "lite0")
        for method in ("simulated", "deployed", "simulated_rounded")
      ),
      columns=(("0 %", "ratio=0"), *percent()),
    ),
  }
  orders = tuple(
    (f"{title}, {order}", f"base=search-{name},method={method}")
    for name, title in searched.items()
    for method, order in _ORDERS
    if name not in ("resnet20", "resnet56")
  )
  for name, value, digits in (("distances", "distance_held_out", 4), ("orders", "top1", 2)):
    columns = tuple((f"{100 * r:g} %", f"ratio={r}") for r in inner)
    forwards = (("forwards", f"ratio={inner[0]}", "forwards"),) if value == "top1" else ()
    tables[name] = Layout(
      title="order", rows=orders, columns=(*columns, *forwards), value=value, digits=digits
    )
  for name, table in (
    *(("resnet20", "main"), ("resnet56", "main"), ("lite0", "main")),
    *(("resnet20", "wide"), ("resnet20", "clado_channel"), ("resnet20", "float8")),
  ):
    tables[f"{name}_{table}"] = _compared(f"compare-{name}-{table}", table)
  return tables


def _compared(base: str, table: str) -> Layout:
  """One comparison: budgets down, methods across."""
  front = "" if table == "main" else f"{table}/"
  names = {
    "wide": ("clado", "clado_diagonal", "mpqco", "random"),
    "clado_channel": ("clado", "clado_diagonal", "mpqco", "random"),
    "float8": ("quantune", "random"),
  }.get(table, tuple(_LAYERWISE))
  rows = {
    "clado_channel": [(f"{100 * s:.0f} %", s) for s in (0.3125, 0.375, 0.4375, 0.5, 0.75)],
    "float8": [(f"{100 * s:g} %", s) for s in (0.25, 0.5, 0.75, 1.0)],
  }.get(table, [(f"{bits} bits", (8 - bits) / 4) for bits in (4, 5, 6, 7)])
  return Layout(
    title={"clado_channel": "size", "float8": "in 8 bits"}.get(table, "average"),
    rows=tuple((title, f"base={base},ratio={ratio}") for title, ratio in rows),
    columns=tuple((_LAYERWISE[name], f"method={front}{name}") for name in names),
  )
