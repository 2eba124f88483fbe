"""What each part of the method is worth: the rows of FlexiQ's Table 7, over several seeds.

A seed draws calibration images, random orders and searches anew. Every row is evaluated on the test
images, on training images that no calibration used (held out), and on the search images.

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

from experiments import curve as base_experiment
from experiments.shared import reporting, setup
from experiments.shared.checks import field
from experiments.shared.rows import Rows
from experiments.shared.stages import Stages
from flexiq_jax import data, evaluation, orders
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.calibrated import Calibrated
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.runs import distributed, plots, process, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search.fitness import DISTANCES

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
  return base_experiment.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  _check(config)
  inputs = base_experiment.prepare(config)
  used, there = config.calibration.images, len(inputs.calibration)
  if not 0 < config.ablation.held_out <= there - used:
    raise ValueError(
      f"config.ablation.held_out: {config.ablation.held_out}; 1..{there - used} is accepted: so "
      f"many training images are left of {there}"
    )
  if config.weights == "train" or config.recipe:
    raise ValueError("config.weights, config.recipe: an ablation takes pretrained weights")
  return inputs


def run(config, inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Runs the ablation; arguments and result as `experiments.curve.run`."""
  started = time.monotonic()
  workdir.event("start", command=command, **process.describe())
  network = base_experiment.network_of(config, inputs)
  Rows(config, inputs, workdir).add("float", None, None, network.float, avg_bits=32.0)
  for seed in config.ablation.seeds:
    _Seed(config, inputs, workdir, network, seed).run()
  if not distributed.is_main():
    return workdir.path / "report.md"
  workdir.event("done", traces=dict(network.traces), peak_memory=process.peak_memory())
  path = _report(config, inputs, workdir, command, network, time.monotonic() - started)
  report.print_results(workdir.rows(), title=f"ablation, {reporting.title(config)}")
  workdir.finish()
  return path


class _Seed:
  """All rows of one seed."""

  def __init__(self, config, inputs, workdir: Workdir, network, seed: int):
    self._config = config.copy_and_resolve_references()
    self._config.seed = seed
    self._inputs, self._workdir, self._network, self._seed = inputs, workdir, network, seed
    self._folder = workdir.path / f"seed{seed}"
    self._folder.mkdir(exist_ok=True)
    self._stages = Stages(config=self._config, inputs=inputs, workdir=Workdir(self._folder))

  def run(self) -> None:
    methods = self._config.ablation.methods
    settings = self._inputs.settings
    calibrated = self._stages.calibrate(self._network)
    self._images = np.concatenate([*calibrated.batches])
    self._held_out = self._draw_held_out()
    self._row("int8", None, lambda x: self._network.uniform(calibrated.base, x), avg_bits=8.0)

    def select(method):
      search = dataclasses.replace(settings.search, method=method)
      if method == "evolution":
        search = dataclasses.replace(search, max_forwards=self._searched("gram").get("forwards", 0))
      path = Path("recipes") / f"{method}.json"
      return self._stages.select(path, calibrated, settings.groups, search)

    found = {}
    for name in ("greedy", "gram", "evolution"):  # evolution takes what gram took
      if name in methods or (name == "gram" and {"gram_dynamic", "evolution"} & {*methods}):
        found[name] = select(name)
    for name in methods:
      if name.startswith("random"):
        groups = dataclasses.replace(settings.groups, **_GROUPS.get(name, {}))
        model = self._random(calibrated, groups)
        ratios = self._config.ablation.random_ratios
      else:
        model = found[name.removesuffix("_dynamic")]
        model = dataclasses.replace(model, dynamic=name.endswith("_dynamic"))
        ratios = self._config.ablation.ratios
      cost = self._searched(name) if name in ("gram", "evolution") else {}
      for ratio in ratios:
        share = model.schedule.mac_share(ratio)
        self._row(
          *(name, ratio, lambda x, m=model, r=ratio: m(x, r)),
          **{"avg_bits": 8 - 4 * share, "mac_share": share, **cost},
          channel_share=model.schedule.channel_share(ratio),
        )

  def _random(self, calibrated: Calibrated, settings: LowSettings) -> AdaptiveModel:
    """The groups of some settings in random order."""
    grouped = calibrated.group(self._inputs.selectable, settings)
    return grouped.ordered(orders.random(grouped.space, self._seed))

  def _searched(self, method: str) -> dict[str, float]:
    """What a search took, from its event in the main process's workdir."""
    return distributed.agree(self._event(method))

  def _event(self, method: str) -> dict[str, float]:
    for event in reversed(self._stages.workdir.events("selected")):
      if event["recipe"] == method and "forwards" in event:
        return {"forwards": event["forwards"], "seconds": event["seconds"]}
    return {}

  def _draw_held_out(self) -> data.Batch:
    """Training images that calibrated nothing, at this seed."""
    config, source = self._config, self._inputs.calibration
    used = data.calibration_indices(source, config.calibration.images, config.seed)
    left = np.setdiff1d(np.arange(len(source)), used)
    drawn = np.random.default_rng(config.seed).permutation(left)[: config.ablation.held_out]
    with field("config.calibration", config.calibration):
      batches = [
        *data.batches(source, self._inputs.settings.preprocess, len(drawn), indices=np.sort(drawn))
      ]
    return batches[0]

  def _row(self, method, ratio, predict, **columns) -> None:
    """Evaluates a row on all three sets of images, and its gain above greedy."""
    if not distributed.is_main() or self._workdir.has(method, ratio, self._seed):
      return
    label = f"seed {self._seed}, {method}" + ("" if ratio is None else f" at {100 * ratio:g} %")
    with setup.shown_batches(self._config, self._inputs, label) as batches:
      right = evaluation.correct(predict, batches)
    folder = self._folder / "correct"
    folder.mkdir(exist_ok=True)
    np.save(_correct(self._folder, method, ratio), right)
    if method != "greedy" and (found := _gain([self._folder], method, ratio)):
      columns["gain"], columns["gain_error"], _ = found
    sets = {"distance": self._images, "distance_held_out": self._held_out.images}
    for column, images in sets.items():
      z = self._logits(predict, images)
      if ratio is None:  # the 8-bit model, which comes first
        np.save(folder / f"{column}.npy", z)
      else:
        distance = DISTANCES[self._config.search.distance]
        columns[column] = np.mean(distance(z, np.load(folder / f"{column}.npy")), dtype=np.float64)
      if images is self._held_out.images:
        columns["held_out"] = 100 * (z.argmax(axis=1) == self._held_out.labels).mean()
    top1 = 100 * right.mean()
    self._workdir.row(method, ratio, self._seed, top1=top1, images=len(right), **columns)

  def _logits(self, predict, images) -> np.ndarray:
    """Logits `[n, K]`, in batches of the evaluation's size, so that nothing compiles anew."""
    size = min(self._config.batch_size, setup.evaluation_count(self._config, self._inputs))
    rows = np.arange(-(-len(images) // size) * size) % len(images)
    parts = [np.asarray(predict(images[rows[i : i + size]])) for i in range(0, len(rows), size)]
    return np.concatenate(parts)[: len(images)]


def _correct(folder: Path, method: str, ratio: float | None) -> Path:
  """Where a seed's folder keeps which test images a row got right, bool `[n]`."""
  return folder / "correct" / f"{method}_{'' if ratio is None else f'{ratio:g}'}.npy"


def _gain(
  folders: Sequence[Path], method: str, ratio: float | None
) -> tuple[float, float, int] | None:
  """Top-1 above greedy's on the same images, in points, and its paired standard error.

  Args:
    folders: of the seeds; an image counts with its mean over them, so that the error is one of
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
  gain = np.mean([own.astype(np.float64) - greedy for own, greedy in both], axis=0)
  error = gain.std(ddof=1) / np.sqrt(len(gain))
  return 100 * gain.mean(), 100 * error, len(both)


def _gains(config, workdir: Path) -> str:
  """The table of gains over greedy, paired over images, the mean of all seeds."""
  folders = [workdir / f"seed{seed}" for seed in config.ablation.seeds]
  cells = []
  ratios = sorted({*config.ablation.ratios, *config.ablation.random_ratios})
  for method, ratio in itertools.product(config.ablation.methods, ratios):
    if method != "greedy" and (found := _gain(folders, method, ratio)):
      gain, error, seeds = found
      times = f"{gain / error:+.1f}" if error else "—"
      row = [method, tables.percent(ratio), str(seeds), f"{gain:+.2f} ± {error:.2f}", times]
      cells.append(row)
  header = ["method", "4-bit ratio", "seeds", "gain (points)", "in standard errors"]
  text = "Of images: each counts with its mean over the seeds.\n\n"
  return text + tables.markdown_table(header, cells, left=1)


def _check(config) -> None:
  part = config.ablation
  for name in part.methods:
    if name not in METHODS:
      raise ValueError(f"config.ablation.methods: {name!r} is not one of {', '.join(METHODS)}")
  if not part.seeds or any(not isinstance(s, int) or s < 0 for s in part.seeds):
    raise ValueError(f"config.ablation.seeds: {part.seeds}; integers from 0 are accepted")
  for name in ("ratios", "random_ratios"):
    if any(not 0 < ratio <= 1 for ratio in part[name]):
      raise ValueError(f"config.ablation.{name}: {part[name]}; numbers in 0..1, above 0")


def _report(config, inputs, workdir, command, network, seconds) -> Path:
  rows = workdir.rows()
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
  curves = tables.curves([r for r in rows if r["ratio"] is not None])
  references = {r["method"]: r["top1"] for r in joined if r["ratio"] is None}
  picture = plots.accuracy_against_ratio(
    workdir.path / "ablation.png",
    curves,
    title=f"Ablation, {reporting.title(config)}",
    references=references,
  )
  return report.write(
    workdir.path,
    title=f"Ablation, {reporting.title(config)}",
    summary={
      "model": config.model,
      "evaluation images": setup.evaluation_count(config, inputs),
      "held-out training images": config.ablation.held_out,
      "calibration and search images": config.calibration.images,
      "seeds": len(config.ablation.seeds),
      "wall time": duration(seconds),
    },
    rows=rows,
    layers=reporting.layer_rows(network.layers, inputs.selectable, config.groups.group_size),
    plots=[("Top-1 of each part, mean over seeds", picture)],
    notes=[
      "Mean ± standard deviation over seeds. Gain: top-1 above `greedy` on the same images.",
    ],
    command=command,
    sections=[("Parts", table), ("Gain over greedy", _gains(config, workdir.path))],
  )
