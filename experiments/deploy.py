"""Deploys a recipe: packed weights, an artifact on disk, one executable, and does it still agree?

The recipe comes from `config.recipe` (a finished run's `recipe.json`); without one the run
calibrates and selects as the experiment `curve` does. Both models see the same images:

| method | what it is |
|---|---|
| `float` | the model as loaded |
| `simulated` | the mixed rule: one int8 contraction per layer, on which searches run |
| `deployed` | the artifact, loaded again: packed codes, the mixed matmul, codes passed on |
| `simulated_rounded` | the simulation with each layer's result one float32 rounding larger |

Columns beside the usual ones: `differing` (images on which another class has the largest logit than
in the simulated model), `logit_error` (largest difference of logits, over their standard
deviation). Integer sums are equal, but a float rounding can move a code, and every later layer
rounds again. `simulated_rounded` shows how much that alone changes. Further tables: bytes on disk
and on the device, which layers gather, what a switch of the ratio costs. All figures are of the
machine that ran them; on a CPU the matmul is the reference.
"""

import collections
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import curve
from experiments.shared import reporting, setup
from experiments.shared.checks import require
from experiments.shared.rows import Rows, shares
from experiments.shared.stages import Stages
from flexiq_jax import deployment, graph, kernels, models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.deployment import Mixed, Plain, artifact
from flexiq_jax.kernels import tile_files, tuning
from flexiq_jax.quant import rules
from flexiq_jax.runs import distributed, process, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir


def describe(config) -> str:
  """The layer table of a config's model, without weights or data."""
  _check(config)
  return curve.describe(config)


def prepare(config) -> setup.Inputs:
  """Checks a config and opens weights and data; nothing is written."""
  _check(config)
  if config.deploy.tuning and not config.deploy.tune:
    try:
      tile_files.read(config.deploy.tuning)
    except ValueError as error:
      why = str(error).removeprefix("tuning: ")
      raise ValueError(f"config.deploy.tuning: {why}") from error
  return curve.prepare(config)


def run(inputs: setup.Inputs, workdir: Workdir, command: str) -> Path:
  """Deploys and compares; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  stages = Stages(inputs, workdir)
  model = _model(stages)
  x = jax.ShapeDtypeStruct((1, *inputs.module.input_shape), jnp.float32)
  folder = workdir.path / "artifact"
  shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
  made = deployment.deploy(model, x, levels=inputs.settings.ratios, granule=config.deploy.granule)
  artifact.save(folder, made, name=config.model)
  # What is measured is what the disk says; the float weights are not needed for it.
  apply, shapes = models.functional(inputs.module)
  deployed = artifact.load(folder, apply, shapes, x)
  size = min(config.batch_size, inputs.evaluated)
  if config.deploy.tune:
    batch = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    shapes = sorted(set(deployment.products(deployed, batch).values()))
    tuning.autotune(shapes, config.deploy.tuning, progress=lambda line: print(line, flush=True))
  runner = deployment.Runner(deployed, sizes=(size,), tuning=config.deploy.tuning or None)
  rows = Rows(inputs, workdir)
  rows.add("float", None, config.seed, stages.network.float, avg_bits=32.0)
  nudged = _rounded(model)
  for ratio in inputs.settings.ratios:
    _compare(inputs, workdir, rows, model, runner, nudged, ratio)
  switches = switch_cost(runner, inputs.settings.ratios, config.deploy.switches)
  switches["traces"] = runner.traces
  workdir.event("switched", **switches)
  seconds = time.monotonic() - started
  path = _report(inputs, workdir, command, model, deployed, switches, seconds)
  report.print_results(workdir.rows(), title=f"deployed, {reporting.title(config)}")
  workdir.finish()
  return path


def _model(stages: Stages) -> AdaptiveModel:
  """The model of the config's recipe, or of one that is found here."""
  if stages.inputs.recipe:
    return stages.given()
  settings = stages.inputs.settings
  return stages.select(Path("recipe.json"), settings.groups, settings.search)


def _rounded(model: AdaptiveModel):
  """`predict(x, ratio)` of the simulation with layer results one rounding off."""

  @jax.jit
  def run(layers, masks, params, x):
    mixed = rules.mixed_rule(layers, masks, model.dynamic, platform=model.network.platform)
    rule = lambda *arguments: mixed(*arguments) * jnp.float32(1 + 2**-23)
    return graph.with_rule(model.network.apply, rule)(params, x)

  params = model.network.params
  return lambda x, ratio: run(model.model, model.schedule.masks(ratio), params, x)


def _compare(inputs, workdir, rows: Rows, model, runner, nudged, ratio: float) -> None:
  """The rows of one ratio; the images pass all models at once."""
  seed, columns = inputs.config.seed, shares(model, ratio)
  ways = {
    "simulated": lambda x: model(x, ratio),
    "deployed": runner,
    "simulated_rounded": lambda x: nudged(x, ratio),
  }
  found: dict[str, list[np.ndarray]] = {method: [] for method in ways}

  def predict(x):
    for method, one in ways.items():
      found[method].append(np.asarray(one(x)))
    return found["simulated"][-1]

  runner.switch(ratio)
  rows.add("simulated", ratio, seed, predict, **columns)
  for method in ("deployed", "simulated_rounded"):
    kept = iter(found[method])
    again = (lambda _, kept=kept: next(kept)) if found[method] else ways[method]
    rows.add(method, ratio, seed, again, **columns)
    if found[method]:
      count = inputs.evaluated  # after them comes padding
      a, b = (np.concatenate(found[name])[:count] for name in ("simulated", method))
      differing = int((a.argmax(axis=1) != b.argmax(axis=1)).sum())
      error = float(np.abs(a - b).max() / a.std())
      workdir.row(method, ratio, seed, differing=differing, logit_error=error)


def switch_cost(runner: deployment.Runner, ratios, times: int) -> dict[str, float]:
  """Host-side cost of changing the ratio until it is on the device.

  Args:
    runner: of the model.
    ratios: gone through in turn.
    times: how often.

  Returns:
    `p50` and `p99` in microseconds.
  """
  seconds = []
  for i in range(times):
    started = time.perf_counter()
    runner.switch(ratios[i % len(ratios)])
    runner.wait()
    seconds.append(time.perf_counter() - started)
  p50, p99 = np.percentile(seconds, (50, 99))
  return {"switches": times, "p50": 1e6 * p50, "p99": 1e6 * p99}


def _check(config) -> None:
  require(config, "deploy", "configs/deploy.py:of=NAME")
  part = config.deploy
  if distributed.several():
    raise ValueError("config.experiment: 'deploy' in several processes; one is accepted")
  if not isinstance(part.granule, int) or part.granule < 2 or part.granule % 2:
    raise ValueError(f"config.deploy.granule: {part.granule}; a positive even number is accepted")
  if part.tune and not part.tuning:
    raise ValueError("config.deploy.tune: True without config.deploy.tuning; name a folder there")
  if part.tune and tile_files.implementation(kind := tile_files.present()) == "reference":
    raise ValueError(
      f"config.deploy.tune: device {kind!r} runs the reference, which has no tiles; True is "
      "accepted on a TPU from v5e on and on a Hopper GPU"
    )
  if not isinstance(part.switches, int) or part.switches < 1:
    raise ValueError(f"config.deploy.switches: {part.switches}; 1 or more is accepted")


def _report(inputs, workdir, command, model, deployed, switches, seconds) -> Path:
  config, rows = inputs.config, workdir.rows()
  space = model.schedule.space
  x = jax.ShapeDtypeStruct((1, *inputs.module.input_shape), jnp.float32)
  return report.write(
    workdir.path,
    title=f"Deployed {reporting.title(config)}",
    summary={
      "model": config.model,
      "evaluation images": inputs.evaluated,
      "implementation": _implementations(deployed),
      "tiles": config.deploy.tuning or ("the project's" if tile_files.shipped() else "by rule"),
      "wall time": duration(seconds),
    },
    rows=rows,
    layers=reporting.layer_rows(
      model.network.layers, dict(zip(space.names, space.sizes, strict=True))
    ),
    plots=[],
    notes=[
      reporting.weights_note(config),
      "`simulated`: the mixed rule. `deployed`: the artifact, loaded from disk without the float "
      "weights of its layers. `simulated_rounded`: the mixed rule with results one rounding off.",
    ],
    command=command,
    sections=[
      ("Agreement", _agreement(rows)),
      ("Bytes", _bytes(workdir.path / "artifact", deployed, x)),
      ("Switching", _switching(switches)),
      ("Where channels gather", _gathers(model.network.layers, deployed)),
    ],
  )


def _agreement(rows) -> str:
  header = ["4-bit ratio", "simulated (%)", "deployed (%)", "images that differ", "logit error"]
  header += ["by rounding alone (%)", "images that differ", "logit error"]
  of = {(r["method"], r["ratio"]): r for r in rows}
  count = lambda r: "—" if r.get("differing") is None else str(r["differing"])
  error = lambda r: "—" if r.get("logit_error") is None else f"{r['logit_error']:.1e}"
  cells = []
  for method, ratio in of:
    if method == "simulated":
      deployed, rounded = of["deployed", ratio], of["simulated_rounded", ratio]
      cells.append([tables.percent(ratio), f"{of[method, ratio]['top1']:.2f}"])
      for r in (deployed, rounded):
        cells[-1] += [f"{r['top1']:.2f}", count(r), error(r)]
  return tables.markdown_table(header, cells)


def _bytes(folder: Path, deployed: deployment.Deployed, x) -> str:
  sizes = deployment.sizes(deployed, x)
  kilobytes = lambda n: f"{n / 1024:.1f}"
  cells = [
    ["float32 model", kilobytes(sizes.float32), "32"],
    ["INT8 model", kilobytes(sizes.int8), "8"],
    ["deployed, on the device", kilobytes(sizes.device), f"{sizes.bits_per_weight:.2f}"],
    ["of these, weight codes", kilobytes(sizes.codes), f"{sizes.bits_per_weight:.2f}"],
    ["deployed, on disk", kilobytes(artifact.bytes_on_disk(folder)), "—"],
  ]
  table = tables.markdown_table(["what", "KiB", "bits of codes per weight"], cells)
  return table + (
    "\n\nBoth widths are kept, 8-bit codes and packed 4-bit codes: 12 bits per weight, and padding "
    "to whole shift blocks. INT8 counts the layers' weights in one byte and the rest in float32."
  )


def _switching(switches) -> str:
  return (
    f"{switches['switches']} changes of the ratio, each until it is on the device: p50 "
    f"{switches['p50']:.1f} µs, p99 {switches['p99']:.1f} µs. All ratios ran in "
    f"{switches['traces']} compiled program(s)."
  )


def _gathers(layers, deployed: deployment.Deployed) -> str:
  feeds, cells = deployed.wiring.feeds, []
  for layer in layers:
    d, feed = deployed.layers[layer.name], feeds[layer.name]
    if isinstance(d, Plain):
      cells.append([layer.name, "reference path", feed.reason])
    elif feed.producer:
      cells.append([layer.name, "codes in order", f"from {feed.producer}"])
    elif d.order is None:
      makers = ", ".join(deployed.wiring.folds.get(layer.name, ()))
      why = f"its order is folded into {makers}" if makers else "its order is the model's own"
      cells.append([layer.name, "in order", why])
    else:
      cells.append([layer.name, "gathers", feed.reason])
  count = collections.Counter(how for _, how, _ in cells)
  head = (
    f"{count['codes in order']} layers take codes in their order from the layer before, "
    f"{count['in order']} take activations that are in their order, {count['gathers']} gather.\n\n"
  )
  return head + tables.markdown_table(["layer", "its input", "why"], cells, left=3)


def _implementations(deployed: deployment.Deployed) -> str:
  """Which kernels run its layers here."""
  names = {
    kernels.choose_implementation(d.weights)
    for d in deployed.layers.values()
    if isinstance(d, Mixed)
  }
  return " and ".join(sorted(names))
