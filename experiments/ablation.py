"""What each part of the method is worth: the rows of FlexiQ's Table 7.

Each seed draws calibration images, random orders and searches anew; configs/ablation.py makes a
table over several seeds. Every row is evaluated on the test images, on training images that
calibration did not use (held out), and on the search images.

| method | what it adds to the row above |
|---|---|
| `random_naive` | groups in random order, top four bits of every code |
| `random_range` | effective bits by range |
| `random_mse` | effective bits by squared error |
| `random` | bias correction (not FlexiQ's): from here on the config's own settings |
| `greedy` | order by error per MAC |
| `evolution` | order by FlexiQ's Algorithm 1, with as many forward passes as `gram` took |
| `gram` | order by the quadratic model of the output distance instead |
| `gram_dynamic` | activation shifts chosen at run time |
| `reconstructed`, `distilled`, `finetuned` | what `config.tune` names, of `gram`'s model, static |

Columns beside the usual ones: `held_out` (top-1 on held-out training images), `distance` and
`distance_held_out` (the search's distance to the 8-bit model's logits, mean per image), `gain`
(points of top-1 above `greedy` on the same test images) and `gain_error` (its paired standard
error), `forwards` and `seconds` of the search.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import curve
from experiments.shared import pictures, reporting, setup, tuned
from experiments.shared.checks import require
from experiments.shared.rows import Rows, shares
from experiments.shared.stages import Stages
from flexiq_jax import evaluation, orders
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.runs import distributed, process, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import DISTANCES

METHODS = (
  *("random_naive", "random_range", "random_mse", "random"),
  *("greedy", "evolution", "gram", "gram_dynamic"),
)
_GROUPS: dict[str, dict[str, Any]] = {
  "random_naive": {
    "activation_shift": "naive",
    "weight_shift": "naive",
    "bias_correction": False,
  },
  "random_range": {
    "activation_shift": "range",
    "weight_shift": "range",
    "bias_correction": False,
  },
  "random_mse": {"bias_correction": False},
}


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  _check(config)
  return curve.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  _check(config)
  inputs = curve.prepare(config)
  used, there = config.calibration.images, len(inputs.calibration)
  if not 0 < config.ablation.held_out <= there - used:
    raise ValueError(
      f"config.ablation.held_out: {config.ablation.held_out}; 1..{there - used} is accepted: so "
      f"many training images are left of {there}"
    )
  if config.weights == "train" or config.recipe:
    raise ValueError("config.weights, config.recipe: an ablation takes pretrained weights")
  return inputs


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Runs the ablation at one seed; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  stages = Stages(inputs, workdir)
  network = stages.network
  Rows(inputs, workdir).add("float", None, None, network.float, avg_bits=32.0)
  rows = _Rows(stages)
  rows.add("int8", None, lambda x: network.uniform(stages.calibrated.base, x), avg_bits=8.0)
  found, part = _searched(stages), config.ablation
  ways = {tuned.DONE[way]: way for way in inputs.settings.tuning}
  for name in (*part.methods, *ways):
    if name.startswith("random"):
      groups = dataclasses.replace(inputs.settings.groups, **_GROUPS.get(name, {}))
      grouped = stages.calibrated.group(inputs.selectable, groups)
      model = grouped.ordered(orders.random(grouped.space, config.seed))
    elif name in ways:
      settings = inputs.settings.tuning[ways[name]]
      model = tuned.Tuner(ways[name], settings, inputs, workdir).adaptive(found["gram"])
    else:
      model = found[name.removesuffix("_dynamic")]
      model = dataclasses.replace(model, dynamic=name.endswith("_dynamic"))
    cost = _cost(workdir, name) if name in ("gram", "evolution") else {}
    for ratio in part.random_ratios if name.startswith("random") else part.ratios:
      predict = lambda x, m=model, r=ratio: m(x, r)
      rows.add(name, ratio, predict, **shares(model, ratio), **cost)
  if not distributed.is_main():
    return workdir.path / "report.md"
  workdir.event("done", traces=dict(network.traces), peak_memory=process.peak_memory())
  path = collect(inputs, [workdir], workdir, command, time.monotonic() - started)
  workdir.finish()
  return path


def _searched(stages: Stages) -> dict[str, AdaptiveModel]:
  """The models whose order is searched, each search at most once."""
  methods, settings = stages.config.ablation.methods, stages.inputs.settings
  of_gram = bool({"gram_dynamic", "evolution"} & {*methods}) or bool(settings.tuning)
  found = {}
  for name in ("greedy", "gram", "evolution"):  # evolution takes what gram took
    if name in methods or (name == "gram" and of_gram):
      search = dataclasses.replace(settings.search, method=name)
      if name == "evolution":
        most = _cost(stages.workdir, "gram").get("forwards", 0)
        search = dataclasses.replace(search, max_forwards=most)
      found[name] = stages.select(Path("recipes") / f"{name}.json", settings.groups, search)
  return found


def _cost(workdir: Workdir, method: str) -> dict[str, float]:
  """What a search took, from its event in the main process's workdir."""
  events = [e for e in workdir.events("selected") if e["recipe"] == method and "forwards" in e]
  last = events[-1] if events else {}
  return distributed.agree({n: last[n] for n in ("forwards", "seconds") if n in last})


class _Rows:
  """Adds rows that are evaluated on test images, held-out images and the search's own."""

  def __init__(self, stages: Stages):
    self._config, self._inputs, self._workdir = stages.config, stages.inputs, stages.workdir
    self._images = np.concatenate([*stages.calibrated.batches])
    self._held_out = stages.inputs.held_out_batch(stages.config.ablation.held_out)

  def add(self, method, ratio, predict, **columns) -> None:
    """Evaluates a row, and its gain above greedy."""
    if not distributed.is_main() or self._workdir.has(method, ratio, self._config.seed):
      return
    label = method if ratio is None else f"{method} at {100 * ratio:g} %"
    with self._inputs.shown_batches(label) as batches:
      right = evaluation.correct(predict, batches)
    path = _correct(self._workdir.path, method, ratio)
    path.parent.mkdir(exist_ok=True)
    np.save(path, right)
    if method != "greedy" and (found := _gain([self._workdir.path], method, ratio)):
      columns["gain"], columns["gain_error"], _ = found
    sets = {"distance": self._images, "distance_held_out": self._held_out.images}
    for column, images in sets.items():
      z = self._logits(predict, images)
      if ratio is None:  # the 8-bit model, which comes first
        np.save(path.parent / f"{column}.npy", z)
      else:
        distance = DISTANCES[self._config.search.distance]
        z8 = np.load(path.parent / f"{column}.npy")
        columns[column] = np.mean(np.asarray(distance(z, z8)), dtype=np.float64)
      if images is self._held_out.images:
        columns["held_out"] = 100 * (z.argmax(axis=1) == self._held_out.labels).mean()
    top1 = 100 * right.mean()
    self._workdir.row(method, ratio, self._config.seed, top1=top1, images=len(right), **columns)

  def _logits(self, predict, images) -> np.ndarray:
    """Logits `[n, K]`, in batches of the evaluation's size, so that nothing compiles anew."""
    size = min(self._config.batch_size, self._inputs.evaluated)
    rows = np.arange(-(-len(images) // size) * size) % len(images)
    parts = [np.asarray(predict(images[rows[i : i + size]])) for i in range(0, len(rows), size)]
    return np.concatenate(parts)[: len(images)]


def _correct(folder: Path, method: str, ratio: float | None) -> Path:
  """Where a seed's folder keeps which test images a row got right, bool `[n]`."""
  return folder / "correct" / f"{method}_{'' if ratio is None else f'{ratio:g}'}.npy"


def _gain(
  folders: Sequence[Path], method: str, ratio: float | None
) -> tuple[float, float | None, int] | None:
  """Top-1 above greedy's on the same images, in points, and its paired standard error.

  Args:
    folders: of the runs; an image counts with its mean over them, so that the error is one of
      images: all seeds see the same ones.
    method: of the row.
    ratio: of the row.

  Returns:
    Gain, its error, and how many seeds have both rows; None where none has.
  """
  pairs = [[_correct(folder, name, ratio) for name in (method, "greedy")] for folder in folders]
  both = [[np.load(path) for path in pair] for pair in pairs if all(p.is_file() for p in pair)]
  if not both:
    return None
  return *evaluation.paired_difference(both), len(both)


def _gains(config, folders: Sequence[Path]) -> str:
  """The table of gains over greedy, paired over images, the mean of all runs."""
  cells = []
  ratios = sorted({*config.ablation.ratios, *config.ablation.random_ratios})
  methods = (*config.ablation.methods, *(tuned.DONE[way] for way in config.get("tune", ())))
  for method, ratio in itertools.product(methods, ratios):
    if method != "greedy" and (found := _gain(folders, method, ratio)):
      gain, error, seeds = found
      times = f"{gain / error:+.1f}" if error else "—"
      spread = "" if error is None else f" ± {error:.2f}"
      row = [method, tables.percent(ratio), str(seeds), f"{gain:+.2f}{spread}", times]
      cells.append(row)
  header = ["method", "4-bit ratio", "seeds", "gain (points)", "in standard errors"]
  text = "Of images: each counts with its mean over the seeds.\n\n"
  return text + tables.markdown_table(header, cells, left=1)


def _check(config) -> None:
  require(config, "ablation", "configs/ablation.py:of=NAME")
  part = config.ablation
  for name in part.methods:
    if name not in METHODS:
      raise ValueError(f"config.ablation.methods: {name!r} is not one of {', '.join(METHODS)}")
  for name in ("ratios", "random_ratios"):
    if any(not 0 < ratio <= 1 for ratio in part[name]):
      raise ValueError(f"config.ablation.{name}: {part[name]}; numbers in 0..1, above 0")


def collect(
  inputs: setup.Inputs,
  runs: Sequence[Workdir],
  workdir: Workdir,
  command: str,
  seconds: float,
) -> Path:
  """Writes the report of one run or of several seeds.

  Args:
    inputs: from `prepare`.
    runs: their workdirs, with all rows.
    workdir: where the report goes, with all rows.
    command: the command line.
    seconds: what this start took.

  Returns:
    The report's path.
  """
  config, rows = inputs.config, workdir.rows()
  joined = tables.aggregate(rows)
  header = ["method", "4-bit ratio", "4-bit MACs (%)", "top-1 (%)", "gain over greedy", "held out"]
  header += ["distance", "held out distance", "forwards", "seconds"]
  cells = [
    [
      row["method"],
      tables.percent(row["ratio"]) if row["ratio"] is not None else "—",
      tables.percent(row.get("mac_share"), 1) if row.get("mac_share") is not None else "—",
      *(
        tables.mean_spread(row.get(name), row.get(f"{name}_spread"), digits)
        for name, digits in (
          *(("top1", 2), ("gain", 2), ("held_out", 2), ("distance", 3)),
          *(("distance_held_out", 3), ("forwards", 0), ("seconds", 0)),
        )
      ),
    ]
    for row in joined
  ]
  table = tables.markdown_table(header, cells)
  picture = pictures.accuracy(
    workdir.path / "ablation.png",
    f"Ablation, {reporting.title(config)}, {inputs.evaluated:,} images",
    rows,
    {pictures.REFERENCES[r["method"]]: r for r in joined if r["ratio"] is None},
  )
  report.print_results(rows, title=f"ablation, {reporting.title(config)}")
  return report.write(
    workdir.path,
    title=f"Ablation, {reporting.title(config)}",
    summary={
      "model": config.model,
      "evaluation images": inputs.evaluated,
      "held-out training images": config.ablation.held_out,
      "calibration and search images": config.calibration.images,
      "seeds": len(runs),
      "wall time": duration(seconds),
    },
    rows=rows,
    layers=reporting.layer_rows(inputs.layers, inputs.groups),
    plots=[picture],
    notes=[
      "Mean ± standard deviation over seeds. Gain: top-1 above `greedy` on the same images.",
    ],
    command=command,
    sections=[("Parts", table), ("Gain over greedy", _gains(config, [run.path for run in runs]))],
  )
