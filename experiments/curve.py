"""FlexiQ's accuracy curve: top-1 over the 4-bit ratio, beside uniform INT8, INT4 and random order.

Stages, each kept in the workdir so that a stopped run goes on after the last complete one: weights
(training only), calibration (`calibration/`), selection (`recipe.json`, `recipes/`), one row of
`results.csv` after the other, report.

| method | what it is |
|---|---|
| `float` | the model as loaded |
| `uniform_int8`, `uniform_int4` | plain uniform quantization, the same calibration |
| `flexiq_gram`, `flexiq_evolution` | the order that the config's search found, or one to compare |
| `flexiq_greedy` | groups in order of error per MAC |
| `flexiq_random` | the same groups in random order |
| `flexiq_greedy_naive` | top four bits of every code (shift 4), no bias correction |
| `flexiq_greedy_range` | shifts by range instead of squared error |
| `flexiq_greedy_per_output` | a weight shift per output channel instead of one per group |
| `flexiq_greedy_uncorrected` | no bias correction |
| `flexiq_METHOD_dynamic` | activation shifts chosen at run time, the config's order |
| `flexiq_reconstructed` | the config's order, weights rounded by their layers' outputs |
| `flexiq_distilled`, `flexiq_finetuned` | the config's order, finetuned over all ratios |
| `uniform_int4_distilled`, `uniform_int4_finetuned` | uniform INT4, finetuned likewise |
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from experiments.shared import reporting, setup, tuned
from experiments.shared.checks import is_seed
from experiments.shared.rows import Rows
from experiments.shared.stages import Stages
from flexiq_jax import data, orders
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.network import Network
from flexiq_jax.runs import distributed, process, report
from flexiq_jax.runs.files import write_bytes
from flexiq_jax.runs.workdir import Workdir

VARIANTS: dict[str, dict[str, Any]] = {
  "naive": {"activation_shift": "naive", "weight_shift": "naive", "bias_correction": False},
  "range": {"activation_shift": "range", "weight_shift": "range"},
  "per_output": {"weight_shift_per": "output"},
  "uncorrected": {"bias_correction": False},
  "dynamic": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Methods:
  """What is to be evaluated.

  Attributes:
    uniform: method -> (bits, float model, quantized layers).
    adaptive: method -> (model, seed); the first is the run's own.
    groups: layer name -> `grouping.Groups` of the run's own; None where nothing was calibrated.
  """

  uniform: dict[str, tuple[int, Network, Any]]
  adaptive: dict[str, tuple[AdaptiveModel, int]]
  groups: Any = None

  @property
  def chosen(self) -> AdaptiveModel:
    return next(iter(self.adaptive.values()))[0]


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  described = setup.describe(config)
  _check(config)
  return reporting.layer_text(described)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written.

  Raises:
    ValueError: something is wrong or missing; names the fields.
  """
  _check(config)
  inputs = setup.prepare(config)
  tuned.require(inputs)
  return inputs


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Runs the experiment.

  Args:
    inputs: from `prepare`.
    workdir: of the run.
    command: the command line, for the report.

  Returns:
    The report's path.
  """
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  if distributed.is_main():
    print(f"{reporting.title(config)}: {_steps(inputs)}", flush=True)
  stages = Stages(inputs, workdir)
  network = stages.network
  methods = _tuned(stages, _from_recipe(stages) if inputs.recipe else _calibrated(stages))

  _evaluate(stages, methods)
  if not distributed.is_main():
    return workdir.path / "report.md"

  workdir.event("done", traces=dict(network.traces), peak_memory=process.peak_memory())
  path = reporting.write(
    inputs,
    workdir,
    command,
    methods.chosen,
    methods.groups,
    time.monotonic() - started,
  )
  report.print_results(workdir.rows(), title=reporting.title(config))
  if config.weights != "random":
    print(f"\n{reporting.headline(workdir.rows())}")
  best = max((r for r in workdir.rows() if r["ratio"] == 1), key=lambda r: r["top1"], default=None)
  workdir.finish(top1_at_100=best["top1"] if best else None)
  return path


def _evaluate(stages: Stages, methods: _Methods) -> None:
  """Adds all rows; how many there are is an event, from which a sweep knows how far it is."""
  inputs, config, network = stages.inputs, stages.config, stages.network
  rows, todo = Rows(inputs, stages.workdir), []
  add = lambda function, *given, **columns: todo.append(
    functools.partial(function, *given, **columns)
  )
  add(rows.add, "float", None, config.seed, network.float, avg_bits=32.0)
  for method, (bits, own, model) in methods.uniform.items():
    predict = lambda x, n=own, m=model: n.uniform(m, x)
    add(rows.add, method, None, config.seed, predict, avg_bits=float(bits))
  for method, (model, seed) in methods.adaptive.items():
    for ratio in inputs.settings.ratios:
      # At 0 all variants are the same 8-bit model, but for those with weights of their own.
      if ratio or model is methods.chosen or model.w_scales is not None:
        add(rows.add_adaptive, method, model, ratio, seed)
  space = methods.chosen.schedule.space
  for seed in () if inputs.recipe else config.random_seeds:
    schedule = orders.Schedule(space, orders.random(space, seed))
    shuffled = dataclasses.replace(methods.chosen, schedule=schedule)
    for ratio in inputs.settings.ratios:
      if 0 < ratio < 1:  # at 0 and 1 every order is the same model
        add(rows.add_adaptive, "flexiq_random", shuffled, ratio, seed)
  if distributed.is_main():
    stages.workdir.event("evaluation", rows=len(todo))
  for row in todo:
    row()


def _steps(inputs: setup.Inputs) -> str:
  """What a run will do, for whoever watches it."""
  config = inputs.config
  evaluation = f"evaluation of every method on {inputs.evaluated:,} images"
  by = f", teacher {config.teacher.model}" if config.teacher.model else ""
  tuning = [f"finetuning ({name}{by})" for name in config.tune]
  if inputs.recipe:
    return ", ".join([*tuning, evaluation])
  training = ["training"] if config.weights == "train" else []
  images = f"{config.calibration.images:,} training images"
  steps = [f"calibration on {images}", f"selection ({config.search.method})", *tuning, evaluation]
  return ", ".join([*training, *steps])


def _check(config) -> None:
  if config.weights == "train" and distributed.several():
    raise ValueError(
      "config.weights: 'train' in several processes; train in one process first (no srun, no "
      "JAX_NUM_PROCESSES), then give the weights as a file"
    )
  for variant in config.variants:
    if variant not in VARIANTS:
      known = ", ".join(VARIANTS)
      raise ValueError(
        f"config.variants: {variant!r} is not one of {known}; give several as \"('naive','range')\""
      )
  if config.tune and distributed.several():
    raise ValueError("config.tune: finetuning runs in one process; start one, with all its devices")
  for seed in config.random_seeds:
    if not is_seed(seed):
      raise ValueError(f"config.random_seeds: {seed!r} is not an integer from 0 to {2**31 - 1}")


def _from_recipe(stages: Stages) -> _Methods:
  """The model of the recipe that the config names; a copy of the recipe goes to the workdir."""
  recipe = stages.inputs.recipe
  assert recipe is not None
  model, path = stages.given(), data.expand_path(stages.config.recipe)
  for name in filter(None, (recipe.weights, path.name)):
    to = "recipe.json" if name == path.name else name
    write_bytes(stages.workdir.path / to, path.with_name(name).read_bytes())
  base = {name: dataclasses.replace(q, low=None) for name, q in model.model.items()}
  return _Methods(
    uniform={"uniform_int8": (8, model.network, base)},
    adaptive={f"flexiq_{recipe.method}": (model, recipe.seed)},
  )


def _tuned(stages: Stages, methods: _Methods) -> _Methods:
  """Adds the finetuned models that the config asks for."""
  inputs, seed = stages.inputs, stages.config.seed
  uniform, adaptive = dict(methods.uniform), dict(methods.adaptive)
  for name, settings in inputs.settings.tuning.items():
    tuner, done = tuned.Tuner(name, settings, inputs, stages.workdir), tuned.DONE[name]
    adaptive[f"flexiq_{done}"] = (tuner.adaptive(methods.chosen), seed)
    if stages.config.tune_int4 and tuned.trains(settings) and "uniform_int4" in methods.uniform:
      _, network, model = methods.uniform["uniform_int4"]
      uniform[f"uniform_int4_{done}"] = (4, *tuner.uniform(network, model))
  return dataclasses.replace(methods, uniform=uniform, adaptive=adaptive)


def _calibrated(stages: Stages) -> _Methods:
  """Calibrates and selects, with the config's settings and with those of its variants."""
  config, inputs, calibrated = stages.config, stages.inputs, stages.calibrated
  network = stages.network
  settings, seed = inputs.settings, config.seed
  kept = [layer.name for layer in inputs.layers if layer.name not in inputs.selectable]

  def select(path, groups, method):
    return stages.select(Path(path), groups, dataclasses.replace(settings.search, method=method))

  chosen = settings.search.method
  found = {f"flexiq_{chosen}": (select("recipe.json", settings.groups, chosen), seed)}
  for method in config.compare:
    if method != chosen:
      model = select(f"recipes/{method}.json", settings.groups, method)
      found[f"flexiq_{method}"] = (model, seed)
  for variant in config.variants:
    if variant == "dynamic":
      model = dataclasses.replace(found[f"flexiq_{chosen}"][0], dynamic=True)
      found[f"flexiq_{chosen}_dynamic"] = (model, seed)
    else:
      changed = dataclasses.replace(settings.groups, **VARIANTS[variant])
      model = select(f"recipes/{variant}.json", changed, "greedy")
      found[f"flexiq_greedy_{variant}"] = (model, seed)
  return _Methods(
    uniform={
      "uniform_int8": (8, network, calibrated.base),
      "uniform_int4": (4, network, calibrated.uniform(4, keep8=kept)),
    },
    adaptive=found,
    groups=calibrated.group(inputs.selectable, settings.groups).groups,
  )
