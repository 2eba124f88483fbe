"""What each part of the method is worth, ResNet-20 at 75 % 4-bit, three seeds (Table 7 of FlexiQ).

The rows of FlexiQ's ablation (EuroSys 2026, Table 7); the paper's own numbers per model are not
public, its text gives average gains. A cell is `configs/ablation.py` at one seed, or a finetuning.

    python run.py --config=configs/table7.py --dry_run
    python run.py --config=configs/table7.py
    python run.py --config=configs/table7.py:runlocal      # tiny, offline

Ours, mean of three seeds: 89.2 % by random order and the naive top four bits, 91.3 % by the default
search (docs/results.md). On two free CPU cores six minutes a cell of the ablation; by estimate 25 a
distilled one, which is that of `configs/table2.py` (80 on one core without AVX-512).
"""

from configs import common, table2
from configs.shared import sweeps
from flexiq_jax.runs.sweeps.layouts import Layout

# Method of the ablation -> what its row says.
PARTS = (
  ("random order, naive top four bits", "method=random_naive"),
  ("+ effective bits by range", "method=random_range"),
  ("+ effective bits by squared error", "method=random_mse"),
  ("+ bias correction (not FlexiQ's)", "method=random"),
  ("+ greedy order", "method=greedy"),
  ("+ evolutionary search", "method=evolution"),
  ("or the default search", "method=gram"),
  ("+ dynamic extraction", "method=gram_dynamic"),
)
_DISTILLED = "base=distilled,method=flexiq_distilled"


def get_config(arg=None):
  """Returns the config; the argument `runlocal` needs no data and takes seconds a cell."""
  options = common.parse_arg(arg, runlocal=False)
  of = "resnet20_cifar10"
  file = f"configs/ablation.py:of={of}" + (",runlocal" if options.runlocal else "")
  ratio = 0.5 if options.runlocal else 0.75
  parts = Layout(
    title=f"{ratio:.0%} 4-bit".replace("%", " %"),
    rows=(
      *((name, f"base=resnet20,{condition}") for name, condition in PARTS),
      *(() if options.runlocal else (("the default search, distilled", _DISTILLED),)),
    ),
    columns=(("ResNet-20", f"ratio={ratio}"),),
  )
  ratios = (0.5,) if options.runlocal else (0.25, 0.5, 0.75, 1.0)
  curves = Layout(
    title="order",
    rows=tuple((name, f"base=resnet20,method={name}") for name in ("greedy", "evolution", "gram")),
    columns=tuple((f"{100 * r:g} %", f"ratio={r}") for r in ratios),
  )
  found = tuple(column for column in curves.columns if column[1] != "ratio=1.0")
  searched = ("forwards", f"ratio={ratios[0]}", "forwards")
  distances = Layout(
    title="order, distance of the logits",
    rows=curves.rows,
    columns=(*found, searched),
    value="distance_held_out",
  )
  bases = {
    "resnet20": sweeps.base(
      file,
      fields=(("experiment", "ablation"),),
      minutes=0.5 if options.runlocal else 6.0,
      memory=1.5,
    )
  }
  tables = {"parts": parts, "searches": curves, "distances": distances}
  if not options.runlocal:
    bases["distilled"] = sweeps.base(
      f"configs/{of}.py", fields=table2.DISTILLED, minutes=25.0, memory=1.5
    )
    tables["distilled"] = Layout(
      title="ResNet-20",
      rows=(
        ("post-training, default search", "base=distilled,method=flexiq_gram"),
        ("distilled", _DISTILLED),
      ),
      columns=(("0 %", "ratio=0.0"), *curves.columns),
    )
    whole, int4 = "method=flexiq_distilled,ratio=1.0", "method=uniform_int4_distilled"
    tables["trained"] = Layout(
      title="both distilled",
      rows=(("ResNet-20", "base=distilled"),),
      columns=(("FlexiQ at 100 %", whole), ("INT4", int4), ("above INT4", whole, "top1", int4)),
    )
  return sweeps.sweep(
    "table7" + ("_runlocal" if options.runlocal else ""),
    bases,
    seeds=(0, 1) if options.runlocal else (0, 1, 2),
    tables=tables,
  )
