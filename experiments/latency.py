"""Latency by 4-bit ratio: of models on each device, of the layers of the config's own.

Rows: `MODEL on DEVICE, batch B, SOURCE` at each ratio, with the columns `seconds`, `gain` (over
0 %) and, where it is modelled, `compute_s` and `memory_s` (of each alone), `bound_by_compute` (its
share of the time), `weight_bytes` and `activation_bytes`. Sources:

| source          | what it is                                                               |
| --------------- | ------------------------------------------------------------------------ |
| `roofline`      | modelled: peak operations and bandwidth (`flexiq_jax/serving/latency.py`) |
| `cycles`        | modelled: `flexiq_jax/serving/npu.py`                                    |
| `schedule`      | estimated: what a TPU's compiler makes of the kernels' products          |
| `measured`, `device script`, `estimated` | as the profile says                             |

`layers/MODEL_DEVICE_BATCH.csv` has the layers of all models, a row for each ratio.
"""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.latency_tables import inputs as given
from experiments.latency_tables import report
from experiments.shared import reporting, served, setup, works
from flexiq_jax.runs import files, process
from flexiq_jax.runs.progress import Progress
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import latency, npu, profile_files

_LAYER = (
  *("layer", "ratio", "low_channels", "macs", "weight_bytes", "activation_bytes"),
  *("seconds", "compute_s", "memory_s", "binds"),
)


def describe(config) -> str:
  """The layer table of a config's model."""
  given.check(config)
  return reporting.layer_text(setup.describe(config))


def prepare(config) -> given.Inputs:
  """Checks a config and reads the files that it names; nothing is written."""
  return given.prepare(config)


def run(inputs: given.Inputs, workdir: Workdir, command: str) -> Path:
  """Makes all tables; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  part = config.latency
  (workdir.path / "layers").mkdir(exist_ok=True)
  names = tuple(dict.fromkeys((config.model, *part.models)))
  with Progress("latency, models", len(names) + 1) as progress:
    for name in names:
      _model(inputs, workdir, name)
      progress.update(note=name)
    for row in inputs.rows:
      _add(workdir, row)
    for row in _measured(inputs, workdir):
      _add(workdir, row)
    progress.update(note="files")
  path = report.write(inputs, workdir, command, time.monotonic() - started)
  workdir.finish()
  return path


def _model(inputs: given.Inputs, workdir: Workdir, name: str) -> None:
  """Rows and layers of one model on all devices."""
  config, ratios = inputs.config, inputs.described.settings.ratios
  layers: works.Works = []
  for device in config.latency.devices:
    used = inputs.devices[device]
    source = "cycles" if isinstance(used, npu.Array) else "roofline"
    for batch in config.latency.batches:
      method = given.method(name, device, batch, source)
      path = workdir.path / "layers" / f"{name}_{device}_{batch}.csv"
      if path.is_file() and all(workdir.has(method, ratio, None) for ratio in ratios):
        continue
      if not layers:
        layers = _layers(inputs, name)
      each = {
        ratio: [latency.layer(used, w, works.boundary(w, low, ratio), batch) for w, low in layers]
        for ratio in ratios
      }
      files.write_text(path, _csv(layers, each, batch))
      first = sum(each[ratios[0]], latency.NOTHING)
      for ratio in ratios:
        whole = sum(each[ratio], latency.NOTHING)
        workdir.row(
          *(method, ratio, None),
          **{"seconds": whole.seconds, "gain": first.seconds / whole.seconds},
          **{"compute_s": whole.compute, "memory_s": whole.memory},
          bound_by_compute=whole.bound_by_compute / whole.seconds,
          **{"weight_bytes": whole.weights, "activation_bytes": whole.activations},
        )


def _layers(inputs: given.Inputs, name: str) -> works.Works:
  """The config's own model as the config has it, others as they are registered."""
  if name == inputs.config.model:
    return works.of_module(inputs.described.module, inputs.described.selectable)
  return works.of_name(name)


def _csv(layers: works.Works, each: Mapping[float, Sequence[latency.Latency]], batch: int) -> str:
  """The layers of a model, as CSV."""
  text = io.StringIO()
  out = csv.writer(text, lineterminator="\n")
  out.writerow(_LAYER)
  for i, (work, low) in enumerate(layers):
    for ratio, found in each.items():
      one = found[i]
      cells = (one.weights, one.activations, one.seconds, one.compute, one.memory)
      places = (work.name, f"{ratio:g}", works.boundary(work, low, ratio), work.macs * batch)
      out.writerow([*places, *(f"{cell:.9g}" for cell in cells), one.bound])
  return text.getvalue()


def _measured(inputs: given.Inputs, workdir: Workdir) -> list[given.Row]:
  """Rows of the artifact, timed on this device once; its profile is kept."""
  part, path = inputs.config.latency, workdir.path / "profile.json"
  if not part.artifact:
    return []
  if not path.is_file():
    name = "config.latency.artifact"
    found = served.measured(
      part.artifact, inputs.described, name, sizes=part.batches, repeats=part.repeats
    )
    profile_files.write(path, found)
  return given.of_profile(profile_files.read(path), inputs.config)


def _add(workdir: Workdir, row: given.Row) -> None:
  if not workdir.has(row.method, row.ratio, None):
    workdir.row(row.method, row.ratio, None, **row.values)
