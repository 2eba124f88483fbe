"""The layer table and `report.md` of a FlexiQ run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import pictures, setup, tuned
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.network import Network
from flexiq_jax.runs import plots, process, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir


def layer_rows(layers, groups: Mapping[str, int]) -> list[dict[str, Any]]:
  """Rows of the layer table.

  Args:
    layers: `graph.Layer`s of a model.
    groups: layer name -> number of its channel groups; only layers that may go to 4 bits.
  """
  return [
    {
      "name": layer.name,
      "kind": layer.kind,
      "in_channels": layer.in_channels,
      "out_channels": layer.out_channels,
      "macs": layer.macs,
      "parameters": layer.params,
      "groups": groups.get(layer.name, 0),
      "bits": "4/8" if layer.name in groups else 8,
    }
    for layer in layers
  ]


def layer_notes(model: Network | setup.Described) -> list[str]:
  """Remarks to the layer table: what is no layer, and which layers share weights."""
  notes = [f"Not quantized: `{s.param}`: {s.reason}." for s in model.skipped]
  return notes + [
    f"`{name}` shares weights with `{other}`." for name, other in model.shared.items()
  ]


def layer_text(described: setup.Described) -> str:
  """The layer table of a model with its remarks, for `--dry_run`."""
  rows = layer_rows(described.layers, described.groups)
  return "\n".join([report.layer_table(rows), *layer_notes(described)])


def title(config) -> str:
  """Model and dataset, for tables and pictures."""
  return f"FlexiQ: {config.model} on {setup.data_name(config)}"


def weights_note(config) -> str:
  """Where the weights come from."""
  random = " Random: the figures show that the pipeline runs, no accuracy."
  return f"Weights: `{config.weights}`.{random if config.weights == 'random' else ''}"


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the rows of a curve say, in sentences; empty where there is no uniform INT8.

  Args:
    rows: result rows; the first method with a ratio is the run's own.
  """
  found = {(r["method"], r["ratio"]): r for r in tables.aggregate(rows)}
  if ("uniform_int8", None) not in found:
    return ""
  text = f"Top-1 is {found['uniform_int8', None]['top1']:.2f} % in 8 bits"
  if ("uniform_int4", None) in found:
    text += f" and {found['uniform_int4', None]['top1']:.2f} % in uniform INT4"
  own = next((method for method, ratio in found if ratio is not None), None)
  parts = []
  for (method, ratio), row in found.items():
    if method == own and ratio and ratio < 1:
      part = f"{row['top1']:.2f} % with {tables.percent(ratio)} of the MACs in 4 bits"
      if other := found.get(("flexiq_random", ratio)):
        part += f" (random order: {tables.mean_spread(other['top1'], other['top1_spread'])})"
      parts.append(part)
  if not parts:
    return ""
  text += f". One model changes between them at run time: {'; '.join(parts)}."
  for done in tuned.DONE.values():
    levels = [
      (r, found[f"flexiq_{done}", r]["top1"]) for r in (0.5, 1.0) if (f"flexiq_{done}", r) in found
    ]
    if levels:
      shown = " and ".join(f"{top1:.2f} % at {tables.percent(ratio)}" for ratio, top1 in levels)
      text += f" {done.capitalize()}, it has {shown}."
  return text


def _methods(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the names in the table are, as they stand in the pictures."""
  named = plots.looks(r["method"] for r in rows if r["ratio"] is not None)
  known = {method: look.name for method, look in named.items()}
  fixed = {
    r["method"]: f"{pictures.REFERENCES[r['method']]} everywhere"
    for r in rows
    if r["method"].startswith("uniform_")
  }
  return "; ".join(f"`{method}`: {name}" for method, name in {**fixed, **known}.items()) + "."


def write(
  inputs: setup.Inputs,
  workdir: Workdir,
  command: str,
  chosen: AdaptiveModel,
  groups,
  seconds: float,
) -> Path:
  """Draws the pictures and writes `report.md`.

  Args:
    inputs: what `setup.prepare` made of the config.
    workdir: of the run, with all rows.
    command: the command line of the run.
    chosen: the model whose schedule is shown.
    groups: layer name -> `grouping.Groups`, or None without calibration.
    seconds: what this start of the run took.

  Returns:
    The report's path.
  """
  config = inputs.config
  rows, network, space = workdir.rows(), chosen.network, chosen.schedule.space
  images = inputs.evaluated
  kept = [layer.name for layer in network.layers if layer.name not in space.names]
  notes = [
    weights_note(config),
    f"{space.total} channel groups in {len(space.names)} layers. "
    f"Always 8-bit: {', '.join(f'`{name}`' for name in kept) or 'none'}.",
    "The ratio counts MACs of the selectable layers; average bits are their MAC-weighted mean.",
  ]
  if "uniform_int4" in {r["method"] for r in rows}:
    notes.append("Uniform INT4 keeps the same layers 8-bit, with the same calibration images.")
  if config.recipe:
    notes.append(f"Nothing was calibrated or selected here; the schedule is of `{config.recipe}`.")
  notes += layer_notes(network)
  memory = process.peak_memory()
  return report.write(
    workdir.path,
    title=title(config),
    summary={
      "text": "" if config.weights == "random" else headline(rows),
      "model": config.model,
      "evaluation images": images,
      "calibration images": config.calibration.images if not config.recipe else None,
      "seed": config.seed,
      "wall time": duration(seconds),
      "peak memory (GiB)": round(memory["host"] / 2**30, 2),
    },
    rows=rows,
    layers=layer_rows(network.layers, dict(zip(space.names, space.sizes, strict=True))),
    plots=pictures.draw(
      *(workdir.path, title(config), rows, network, chosen, groups),
      distance=config.search.distance,
      images=images,
      search_images=config.search.images or config.calibration.images,
    ),
    notes=notes,
    command=command,
    sections=[("Methods", _methods(rows))],
  )
