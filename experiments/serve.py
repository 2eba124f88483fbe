"""Serves a deployed model until SIGTERM or Ctrl-C; see configs/serve.py and docs/serving.md.

    artifact (made where it is missing) -> Runner -> profile -> controller -> engine -> HTTP

The workdir keeps the profile that was measured, and of each session an event and a report: requests
by outcome, examples by ratio.
"""

import collections
import time
from pathlib import Path

import numpy as np

from experiments import curve, deploy
from experiments.server import sources
from experiments.server.sources import Sources
from experiments.shared import identity
from experiments.shared.checks import field, require
from experiments.shared.served import load_artifact
from flexiq_jax import deployment, serving
from flexiq_jax.deployment import artifact
from flexiq_jax.runs import distributed, process, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import Engine, profile_files, server

CONTROLLERS = ("load", "predictive", "fixed")
_REPEATS = 10  # batches of each size and ratio that a profile is measured on


def describe(config) -> str:
  """The layer table of the model that is served; nothing is deployed."""
  _check(config)
  return curve.describe(sources.adopted(config))


def prepare(config) -> Sources:
  """Checks a config, opens what it reads, and takes the port; nothing is written."""
  _check(config)
  return sources.open_all(config)


def run(inputs: Sources, workdir: Workdir, command: str) -> Path:
  """Serves; arguments and result as `experiments.curve.run`."""
  config = inputs.config
  workdir.event("start", command=command, **process.describe())
  folder = inputs.folder or _deploy(inputs, command)
  module = inputs.described.module
  deployed = load_artifact(folder, module, "config.artifact")
  sizes = tuple(sorted(set(config.serve.sizes)))
  runner = deployment.Runner(deployed, sizes=sizes, tuning=config.deploy.tuning or None)
  levels = tuple(float(level) for level in artifact.read(folder).levels)
  engine, used = _engine(inputs, workdir, runner, levels)
  prepared = sources.preprocessing(inputs.described)
  part = config.serve
  served = server.Model(
    name=part.name or config.model,
    shape=tuple(module.input_shape),
    classes=module.num_classes,
    levels=levels,
    class_names=inputs.class_names,
    accuracies=inputs.accuracies or sources.accuracies(config.serve, folder),
    preprocess=prepared,
    geometry=(prepared.resize, prepared.crop),
  )
  told = server.Shown(
    controller=f"{part.controller}, target {1e3 * part.target:g} ms; {used.source} profile",
    target=part.target,
    hold=part.hold,
  )
  app = server.create_app(
    engine,
    served,
    limits=inputs.limits,
    told=told,
    priorities=tuple(part.priorities),
    deadline=part.deadline or None,
  )
  examples = _count_examples(engine)
  host, port = inputs.sock.getsockname()[:2]
  host = f"[{host}]" if ":" in host else host
  ready = lambda: print(f"serving {served.name} at http://{host}:{port}/", flush=True)
  started = time.monotonic()
  server.Listening(
    app=app,
    engine=engine,
    sock=inputs.sock,
    limits=inputs.limits,
    drain_seconds=part.drain,
    ready=ready,
  ).run()
  return _report(workdir, command, served, engine, used, examples, time.monotonic() - started)


def _deploy(inputs: Sources, command: str) -> Path:
  """Makes the artifact as the experiment `deploy` does, in a workdir that later starts find."""
  assert inputs.made is not None
  folder = sources.deployed_at(inputs.config)
  print(f"deploying {inputs.config.model}: {folder}", flush=True)
  workdir = Workdir(folder)
  workdir.config(identity.plain(inputs.made.config))
  with workdir.held():
    if workdir.finished is None:
      deploy.run(inputs.made, workdir, command)
  return folder / "artifact"


def _engine(
  inputs: Sources, workdir: Workdir, runner: deployment.Runner, levels: tuple[float, ...]
) -> tuple[Engine, serving.Profile]:
  """The engine, and the profile that it plans with."""
  config, part = inputs.config, inputs.config.serve
  compute = serving.runner_function(runner)
  example = np.zeros(inputs.described.module.input_shape, np.float32)
  sizes = sorted(set(part.sizes))
  used, path = inputs.profile, workdir.path / "profile.json"
  if used is None and path.is_file():
    used = profile_files.read(path)
  if used is None:
    used = serving.measure(
      compute, example, sizes=sizes, ratios=levels, repeats=_REPEATS, model=config.model
    )
    profile_files.write(path, used)
  print(f"profile: {used.describe()}", flush=True)
  with field("config.serve.profile"):
    used.latencies(levels[0], sizes[-1])
    used.latencies(levels[-1], sizes[-1])
  options = {"ratio": part.ratio} if part.controller == "fixed" else {}
  chosen = levels if part.controller == "fixed" else gaining(used, levels, sizes[-1], part.gain)
  if len(chosen) < len(levels):
    left = ", ".join(f"{100 * r:g} %" for r in levels if r not in chosen)
    print(f"not chosen, since they gain less than {100 * part.gain:g} %: {left}", flush=True)
  if part.controller == "fixed" and part.ratio not in levels:
    accepted = ", ".join(f"{level:g}" for level in levels)
    raise ValueError(f"config.serve.ratio: {part.ratio}; {accepted} is accepted")
  with field("config.serve", part):
    controller = serving.create(
      part.controller,
      used,
      levels=chosen,
      target=part.target,
      largest=sizes[-1],
      **options,
    )
    engine = Engine(
      compute,
      controller,
      profile=used,
      batching=serving.Batching(size=sizes[-1], delay=part.delay),
      queue=part.queue,
      warm=sizes,
      example=example,
    )
  return engine, used


def gaining(
  used: serving.Profile, levels: tuple[float, ...], largest: int, gain: float
) -> tuple[float, ...]:
  """The lowest level, and each that is faster than the one kept before it.

  Args:
    used: latencies.
    levels: ratios, ascending.
    largest: examples of a batch.
    gain: share of examples a second that a level has to add.
  """
  kept = [levels[0]]
  for level in levels[1:]:
    if used.throughput(level, largest) >= (1 + gain) * used.throughput(kept[-1], largest):
      kept.append(level)
  return tuple(kept)


def _count_examples(engine: Engine) -> collections.Counter[float]:
  """Examples by ratio, counted from now on beside what the server counts."""
  found, others = collections.Counter[float](), engine.on_batch

  def on_batch(record: serving.BatchRecord) -> None:
    if others is not None:
      others(record)
    if record.outcome == "answered":
      found[record.ratio] += record.size

  engine.on_batch = on_batch
  return found


def _report(workdir, command, served, engine, used, examples, seconds) -> Path:
  state, total = engine.state(), max(1, examples.total())
  outcomes = ("answered", "refused", "late", "failed", "cancelled")
  counts = {name: getattr(state, name) for name in outcomes}
  workdir.event(
    "served", seconds=seconds, **counts, examples={str(r): n for r, n in examples.items()}
  )
  by_ratio = [
    [tables.percent(ratio), f"{examples[ratio]:,}", tables.percent(examples[ratio] / total, 1)]
    for ratio in served.levels
  ]
  by_size = [[str(size), f"{count:,}"] for size, count in state.batches.items()]
  return report.write(
    workdir.path,
    title=f"Served {served.name}",
    summary={
      **{name: f"{count:,}" for name, count in counts.items()},
      "time": duration(seconds),
    },
    rows=[],
    layers=[],
    plots=[],
    notes=[f"Profile: {used.describe()}.", "Of the last session; all are in `metrics.jsonl`."],
    command=command,
    sections=[
      ("Examples by ratio", tables.markdown_table(["4-bit ratio", "examples", "share"], by_ratio)),
      ("Batches by size", tables.markdown_table(["examples", "batches"], by_size)),
    ],
  )


def _check(config) -> None:
  """Refuses values that need neither an artifact nor data to be wrong."""
  for section in ("serve", "limits", "artifact", "deploy"):
    require(config, section, "configs/serve.py")
  part = config.serve
  if distributed.several():
    raise ValueError("config.experiment: 'serve' in several processes; one is accepted")
  if part.controller not in CONTROLLERS:
    raise ValueError(
      f"config.serve.controller: {part.controller!r}; one of {', '.join(CONTROLLERS)} is accepted"
    )
  if not part.sizes or any(type(n) is not int or n < 1 for n in part.sizes):
    raise ValueError(f"config.serve.sizes: {part.sizes}; positive integers are accepted")
  if not 0 <= part.gain < 10:
    raise ValueError(f"config.serve.gain: {part.gain}; a share of at least 0 is accepted")
  for name in ("target", "drain", "delay", "deadline"):
    value, least = part[name], "above" if name == "target" else "of at least"
    if not 0 <= value < 1e6 or (name == "target" and value == 0):
      raise ValueError(f"config.serve.{name}: {value}; seconds {least} 0 are accepted")
  for value in part.priorities:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
      raise ValueError(f"config.serve.priorities: {value!r}; seconds above 0 are accepted")
  if part.queue < max(part.sizes):
    raise ValueError(
      f"config.serve.queue: {part.queue}; at least the largest of sizes, {max(part.sizes)}, is "
      "accepted"
    )
