"""FlexiQ's accuracy curve: top-1 over the 4-bit ratio, beside uniform INT8, INT4 and random order.

Stages, each kept in the workdir so that a stopped run goes on behind the last complete one: weights
(training only), calibration (`calibration/`), selection (`recipe.json`, `recipes/`), one row of
`results.csv` after the other, report.

| method | what it is |
|---|---|
| `float` | the model as loaded |
| `uniform_int8`, `uniform_int4` | plain uniform quantization, the same calibration |
| `flexiq_greedy` | groups in order of error per MAC, with the config's settings |
| `flexiq_random` | the same groups in random order |
| `flexiq_greedy_naive` | top four bits of every code (shift 4), no bias correction |
| `flexiq_greedy_range` | shifts by range instead of squared error |
| `flexiq_greedy_per_output` | a weight shift per output channel instead of one per group |
| `flexiq_greedy_uncorrected` | no bias correction |
| `flexiq_greedy_dynamic` | activation shifts chosen at run time |
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pictures, setup
from flexiq_jax import evaluation, flexiq, grouping, models, report, runtime, selection, train
from flexiq_jax.calibration import Values
from flexiq_jax.checkpoint import Checkpoints
from flexiq_jax.metrics import Writer
from flexiq_jax.selection import recipe as recipes

VARIANTS: dict[str, dict[str, Any]] = {
  "naive": {"activation_shift": "naive", "weight_shift": "naive", "bias_correction": False},
  "range": {"activation_shift": "range", "weight_shift": "range"},
  "per_output": {"weight_shift_per": "output"},
  "uncorrected": {"bias_correction": False},
  "dynamic": {},
}


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  settings = _check(config)
  layers, skipped, _ = setup.abstract_layers(config, settings)
  names = setup.selectable(config, layers)
  rows = layer_rows(layers, names, settings.groups.group_size)
  notes = [f"not a layer: {s.param}: {s.reason}" for s in skipped]
  return "\n".join([report.layer_table(rows), *notes])


def layer_rows(layers, names, group_size: int) -> list[dict[str, Any]]:
  """Rows of the layer table."""
  return [
    {
      "name": layer.name,
      "kind": layer.kind,
      "in_channels": layer.in_channels,
      "out_channels": layer.out_channels,
      "macs": layer.macs,
      "parameters": layer.params,
      "groups": -(-layer.in_channels // group_size) if layer.name in names else 0,
      "bits": "4/8" if layer.name in names else 8,
    }
    for layer in layers
  ]


def run(config, workdir: Path, writer: Writer, command: str) -> Path:
  """Runs the experiment and returns the report's path."""
  settings = _check(config)
  layers, _, module = setup.abstract_layers(config, settings)
  names = setup.selectable(config, layers)
  recipe = recipes.load(config.recipe) if config.recipe else None
  if recipe:
    recipes.require_fit(recipe, layers)
  evaluation_source, calibration_source, params = setup.require_inputs(config, module)
  writer.event("start", command=command, **runtime.describe())
  started = time.monotonic()

  if params is None:
    module = setup.build(config, settings)
    if config.weights == "train":
      module = _train(settings, module, calibration_source, workdir, writer)
    apply, params = models.functional(module)
  else:
    apply, _ = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  network = flexiq.Network(apply, params, x)

  methods: dict[str, tuple[flexiq.FlexiQ, int | None]] = {}
  groups, uniform = None, {}
  if recipe:
    methods[f"flexiq_{recipe.method}"] = (
      flexiq.from_recipe(network, recipe, config.dynamic),
      recipe.seed,
    )
    recipes.save(workdir / "recipe.json", recipe)
    uniform["uniform_int8"] = _without_low(methods[f"flexiq_{recipe.method}"][0].model)
  else:
    batches = setup.calibration_batches(config, settings, calibration_source)
    observations = _observe(network, batches, settings, workdir, writer)
    base = flexiq.base_model(network, observations, settings.ranges)
    keep8 = [layer.name for layer in layers if layer.name not in names]
    uniform["uniform_int8"] = base
    uniform["uniform_int4"] = flexiq.base_model(
      network, observations, settings.ranges, bits=4, keep8=keep8
    )
    groups = flexiq.group(network, base, observations, names, settings.groups)
    select = _Selector(config, settings, network, base, observations, names, batches, writer)
    greedy = select(workdir / "recipe.json", settings.groups)
    methods["flexiq_greedy"] = (greedy, config.seed)
    for variant in config.variants:
      changed = dataclasses.replace(settings.groups, **VARIANTS[variant])
      if variant == "dynamic":
        methods["flexiq_greedy_dynamic"] = (dataclasses.replace(greedy, dynamic=True), config.seed)
      else:
        path = workdir / "recipes" / f"{variant}.json"
        methods[f"flexiq_greedy_{variant}"] = (select(path, changed), config.seed)

  rows = _Rows(config, settings, evaluation_source, writer)
  rows.add("float", None, config.seed, network.float, avg_bits=32.0)
  for method, model in uniform.items():
    bits = 8.0 if method == "uniform_int8" else 4.0
    rows.add(method, None, config.seed, lambda x, m=model: network.uniform(m, x), avg_bits=bits)
  for method, (model, seed) in methods.items():
    for ratio in settings.ratios:
      rows.add_flexiq(method, model, ratio, seed)
  if not recipe:
    for seed in config.random_seeds:
      order = selection.random(greedy.schedule.space, seed)
      shuffled = dataclasses.replace(
        greedy, schedule=selection.Schedule(greedy.schedule.space, order)
      )
      for ratio in settings.ratios:
        if 0 < ratio < 1:  # at 0 and 1 every order is the same model
          rows.add_flexiq("flexiq_random", shuffled, ratio, seed)

  chosen = next(iter(methods.values()))[0]
  writer.event("done", traces=dict(network.traces), peak_memory=runtime.peak_memory())
  seconds = time.monotonic() - started
  path = _report(config, workdir, writer, command, network, chosen, groups, rows.images, seconds)
  report.print_results(writer.rows(), title=_title(config))
  best = max((r for r in writer.rows() if r["ratio"] == 1), key=lambda r: r["top1"], default=None)
  writer.finish(top1_at_100=best["top1"] if best else None)
  return path


def _check(config) -> setup.Settings:
  settings = setup.check(config)
  for variant in config.variants:
    if variant not in VARIANTS:
      known = ", ".join(VARIANTS)
      raise ValueError(f"config.variants: {variant!r} is not one of {known}")
  for seed in config.random_seeds:
    if not isinstance(seed, int) or seed < 0:
      raise ValueError(f"config.random_seeds: {seed!r} is not an integer from 0")
  return settings


def _train(settings, module, source, workdir: Path, writer: Writer):
  """Trains from scratch; goes on from the last checkpoint."""

  def log(entry: train.EpochLog) -> None:
    writer.event("train", **dataclasses.asdict(entry))
    held_out = "" if entry.held_out_top1 is None else f", held out {entry.held_out_top1:.1f} %"
    progress.update(
      entry.epoch - progress_state["done"],
      f"loss {entry.loss:.3f}, top-1 {entry.train_top1:.1f} %{held_out}",
    )
    progress_state["done"] = entry.epoch

  progress_state = {"done": 0}
  with (
    setup.field("config.train"),
    runtime.Progress("training, epochs", settings.train.epochs) as progress,
  ):
    module, _ = train.fit(
      module,
      source,
      settings.preprocess,
      settings=settings.train,
      checkpoint_dir=workdir / "train",
      progress=log,
    )
  return module


def _observe(network, batches, settings, workdir: Path, writer: Writer) -> flexiq.Observations:
  """Calibration statistics, from the workdir if they are there."""
  template = {
    layer.name: {
      "counts": np.zeros(flexiq.calibration.BINS, np.int64),
      "edges": np.zeros(flexiq.calibration.BINS + 1, np.float64),
      "codes": np.zeros((layer.in_channels, 256), np.int64),
    }
    for layer in network.layers
  }
  with Checkpoints(workdir / "calibration") as checkpoints:
    found = checkpoints.restore_latest(template)
    if found is None:
      with _PassProgress(sum(map(len, batches))) as progress:
        observed = flexiq.observe(network, batches, settings.ranges, progress)
      tree = {
        name: {"counts": v.counts, "edges": v.edges, "codes": observed.codes[name]}
        for name, v in observed.values.items()
      }
      checkpoints.save(0, tree, {"images": sum(map(len, batches))})
      writer.event("calibrated", images=sum(map(len, batches)))
    else:
      tree = found.tree
  return flexiq.Observations(
    values={n: Values(np.asarray(t["counts"]), np.asarray(t["edges"])) for n, t in tree.items()},
    codes={name: np.asarray(t["codes"]) for name, t in tree.items()},
  )


@dataclasses.dataclass(frozen=True)
class _Selector:
  """Greedy selection under given settings, kept as a recipe file."""

  config: Any
  settings: setup.Settings
  network: flexiq.Network
  base: Any
  observations: flexiq.Observations
  names: tuple[str, ...]
  batches: list[np.ndarray]
  writer: Writer

  def __call__(self, path: Path, settings: grouping.LowSettings) -> flexiq.FlexiQ:
    if not path.is_file():
      self._select(path, settings)
    # What is evaluated is what the file says.
    recipe = recipes.load(path)
    return flexiq.from_recipe(self.network, recipe, self.config.dynamic)

  def _select(self, path: Path, settings: grouping.LowSettings) -> None:
    groups = flexiq.group(self.network, self.base, self.observations, self.names, settings)
    model = flexiq.lower(self.network, self.base, groups, settings)
    space = flexiq.space(self.network, groups)
    batches = self.batches if self.config.score == "exact" else None
    with _PassProgress(sum(map(len, self.batches)), f"{path.stem}, ") as progress:
      scores = flexiq.score(self.network, model, groups, batches, progress)
    schedule = selection.Schedule(space, selection.greedy(space, scores))
    recipe = flexiq.to_recipe(
      flexiq.FlexiQ(self.network, model, schedule),
      groups,
      model_name=self.config.model,
      method="greedy",
      seed=self.config.seed,
      ranges=self.settings.ranges,
      settings=settings,
    )
    path.parent.mkdir(exist_ok=True)
    recipes.save(path, recipe)
    self.writer.event("selected", recipe=path.stem, groups=space.total)


class _Rows:
  """Evaluates methods and writes result rows; rows that are there are left alone."""

  def __init__(self, config, settings: setup.Settings, source, writer: Writer):
    self._config, self._settings, self._source = config, settings, source
    self._writer = writer
    self.images = setup.evaluation_batches(config, settings, source)[1]

  def add(self, method: str, ratio: float | None, seed: int | None, predict: Callable, **columns):
    """Evaluates one row."""
    if self._writer.has(method, ratio, seed):
      return
    batches, count = setup.evaluation_batches(self._config, self._settings, self._source)
    label = method if ratio is None else f"{method} at {100 * ratio:g} %"
    with runtime.Progress(f"{label}, images", count) as progress:

      def counted():
        for batch in batches:
          yield batch
          progress.update(int(batch.mask.sum()))

      with setup.field("config.data"):
        top1, images = evaluation.top1(predict, counted())
    reference = {r["method"]: r["top1"] for r in self._writer.rows() if r["ratio"] is None}
    drops = {
      f"drop_{name}": reference[row] - top1
      for name, row in (("float", "float"), ("int8", "uniform_int8"))
      if row in reference
    }
    if method == "float":
      drops = {"drop_float": 0.0}
    elif method == "uniform_int8":
      drops["drop_int8"] = 0.0
    self._writer.row(method, ratio, seed, top1=top1, images=images, **drops, **columns)

  def add_flexiq(self, method: str, model: flexiq.FlexiQ, ratio: float, seed: int | None):
    """Evaluates a FlexiQ model at one ratio."""
    share = model.schedule.mac_share(ratio)
    self.add(
      method,
      ratio,
      seed,
      lambda x: model(x, ratio),
      avg_bits=8 - 4 * share,
      mac_share=share,
      channel_share=model.schedule.channel_share(ratio),
    )


class _PassProgress:
  """Shows the calibration passes one after the other: called as `progress(pass, examples done)`."""

  def __init__(self, total: int, prefix: str = ""):
    self._total, self._prefix = total, prefix
    self._name, self._bar, self._done = "", None, 0

  def __enter__(self):
    return self

  def __call__(self, name: str, done: int) -> None:
    if name != self._name:
      self.__exit__(None, None, None)
      self._name, self._done = name, 0
      self._bar = runtime.Progress(f"{self._prefix}{name}, images", self._total)
      self._bar.__enter__()
    assert self._bar is not None
    self._bar.update(done - self._done)
    self._done = done

  def __exit__(self, kind, *error):
    if self._bar is not None:
      self._bar.__exit__(kind, *error)
      self._bar = None


def _without_low(model):
  return {name: q.replace(low=None) for name, q in model.items()}


def _title(config) -> str:
  return f"FlexiQ: {config.model} on {Path(config.data.root or config.data.name).name}"


def _report(config, workdir, writer, command, network, chosen, groups, images, seconds) -> Path:
  """Draws the pictures and writes `report.md`."""
  title, rows = _title(config), writer.rows()
  space = chosen.schedule.space
  drawn = pictures.draw(workdir, f"{title}, {images} images", rows, network, chosen, groups)
  kept = [layer.name for layer in network.layers if layer.name not in space.names]
  notes = [
    f"Weights: `{config.weights}`."
    + (
      " Random: the figures show that the pipeline runs, no accuracy."
      if config.weights == "random"
      else ""
    ),
    f"{space.total} channel groups of at most {config.groups.group_size} channels in "
    f"{len(space.names)} layers. Always 8-bit: {', '.join(f'`{name}`' for name in kept)}.",
    "The ratio counts MACs of the selectable layers; average bits are their MAC-weighted mean.",
  ]
  if "uniform_int4" in {r["method"] for r in rows}:
    notes.append("Uniform INT4 keeps the same layers 8-bit, with the same calibration images.")
  notes += [f"Not quantized: `{s.param}`: {s.reason}." for s in network.skipped]
  memory = runtime.peak_memory()
  return report.write(
    workdir,
    title=title,
    summary={
      "model": config.model,
      "evaluation images": images,
      "calibration images": config.calibration.images if not config.recipe else None,
      "seed": config.seed,
      "wall time": runtime.duration(seconds),
      "peak memory (GiB)": round(memory["host"] / 2**30, 2),
    },
    rows=rows,
    layers=layer_rows(network.layers, space.names, config.groups.group_size),
    plots=drawn,
    notes=notes,
    command=command,
  )
