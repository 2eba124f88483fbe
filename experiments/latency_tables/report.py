"""The report of latency tables."""

import csv
from pathlib import Path
from typing import Any

from experiments.latency_tables.inputs import Inputs
from flexiq_jax.runs import plots, tables
from flexiq_jax.runs import report as reports
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import npu

_MODELLED = ("roofline", "cycles")


def write(inputs: Inputs, workdir: Workdir, command: str, seconds: float) -> Path:
  """Writes the report and its picture.

  Returns:
    The report's path.
  """
  config, part = inputs.config, inputs.config.latency
  rows = _by_method(workdir.rows())
  sections = []
  for batch in part.batches:
    sections.append((f"Modelled, batch {batch}", _table(rows, inputs, batch, _MODELLED)))
  others = _table(rows, inputs, None, ())
  if others:
    sections.append(("Measured and estimated", others))
  shown, batch = part.devices[0], part.batches[-1]
  path = workdir.path / "layers" / f"{config.model}_{shown}_{batch}.csv"
  sections.append((f"Layers of {config.model} on {shown}, batch {batch} (modelled)", _layers(path)))
  sections.append(("Devices", _devices(inputs)))
  panels: dict[str, dict[str, Any]] = {}
  for (model, device, of_batch, source), line in rows.items():
    if source in _MODELLED and of_batch == batch:
      x = sorted(line)
      panels.setdefault(model, {})[device] = (x, [line[ratio]["gain"] for ratio in x])
  picture = plots.gain_against_ratio(
    workdir.path / "latency.png", panels, title=f"Modelled, batch {batch}"
  )
  return reports.write(
    workdir.path,
    title=f"Latency by 4-bit ratio ({config.model} and others)",
    summary={
      "models": ", ".join(dict.fromkeys((config.model, *part.models))),
      "devices": ", ".join(part.devices),
      "batches": ", ".join(map(str, part.batches)),
      "wall time": duration(seconds),
    },
    rows=[],
    layers=[],
    plots=[("Speed over that of 0 %, a line for each device", picture)],
    notes=[
      "`roofline` and `cycles` are modelled; no device ran. A roofline has no launches, tiles, "
      "epilogues or shift blocks, and writes all results as bfloat16, where kernels may hand on "
      "codes (docs/kernels.md has their schedules).",
      "Each selectable layer has the ratio's share of its channels in 4 bits; the first and the "
      "last keep 8 bits.",
      "Depthwise layers, attention's products of activations, norms and sums are not counted.",
      *inputs.notes,
    ],
    command=command,
    sections=sections,
  )


def _by_method(rows) -> dict[tuple[str, str, int, str], dict[float, dict[str, Any]]]:
  """(model, device, batch, source) -> ratio -> row."""
  found: dict[tuple[str, str, int, str], dict[float, dict[str, Any]]] = {}
  for row in rows:
    # A device's name may hold anything, the other three hold no such separators.
    model, _, rest = row["method"].partition(" on ")
    device, batch, source = rest.rsplit(", ", 2)
    key = (model, device, int(batch.removeprefix("batch ")), source)
    found.setdefault(key, {})[row["ratio"]] = row
  return found


def _table(rows, inputs: Inputs, batch: int | None, sources: tuple[str, ...]) -> str:
  """Lines of one batch and some sources, or of all batches and the other sources."""
  ratios = inputs.described.settings.ratios
  last, cells = ratios[-1], []
  for (model, device, of_batch, source), line in rows.items():
    if (source in _MODELLED) != bool(sources) or (batch is not None and of_batch != batch):
      continue
    low, high = (line.get(ratio, {}) for ratio in (0.0, last))
    bound = [row.get("bound_by_compute") for row in (low, high)]
    size = [row.get("weight_bytes") for row in (low, high)]
    moved = [row.get("activation_bytes") for row in (low, high)]
    cells.append(
      [
        model,
        f"{device}, {source}" if batch is not None else f"{device}, batch {of_batch}, {source}",
        _milliseconds(low.get("seconds")),
        *(tables.number(line.get(ratio, {}).get("gain")) for ratio in ratios if ratio),
        " / ".join(tables.DASH if b is None else tables.percent(b) for b in bound),
        " / ".join(tables.DASH if n is None else f"{n / 1e6:.1f}" for n in size),
        " / ".join(tables.DASH if n is None else f"{n / 1e6:.1f}" for n in moved),
      ]
    )
  if not cells:
    return ""
  header = ["model", "device", "0 % (ms)", *(tables.percent(r) for r in ratios if r)]
  header += [f"bound by compute, 0 / {100 * last:g} %", "weights (MB)", "activations (MB)"]
  return tables.markdown_table(header, cells, left=2)


def _layers(path: Path) -> str:
  """One model's layers on one device."""
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  lines: dict[str, list[dict[str, str]]] = {}
  for row in rows:
    lines.setdefault(row["layer"], []).append(row)
  cells, ratios = [], [float(row["ratio"]) for row in next(iter(lines.values()))]
  for name, line in lines.items():
    ends = line[0], line[-1]
    cells.append(
      [
        name,
        tables.si(float(line[0]["macs"])),
        *(
          " / ".join(tables.si(float(row[column])) for row in ends)
          for column in ("weight_bytes", "activation_bytes")
        ),
        *(f"{1e6 * float(row['seconds']):.2f}" for row in line),
        " / ".join(row["binds"] for row in ends),
      ]
    )
  header = ["layer", "MACs", "weights (B)", "activations (B)"]
  header += [*(f"{tables.percent(ratio)} (µs)" for ratio in ratios), "binds"]
  about = f"Bytes and what binds at {tables.percent(ratios[0])} / {tables.percent(ratios[-1])}."
  return f"{about}\n\n{tables.markdown_table(header, cells)}"


def _devices(inputs: Inputs) -> str:
  cells = []
  for name, device in inputs.devices.items():
    if isinstance(device, npu.Array):
      peak = 2 * device.rows * device.columns * device.clock
      numbers = [peak, device.factor * peak, device.bandwidth * device.clock]
      source = "the config; cycles by `serving/npu.py`"
      note = f"{device.factor} weights of 4 bits in a cell"
    else:
      numbers = [device.int8, device.int4, device.bandwidth]
      source, note = device.source, device.note
    cells.append([name, *(f"{n / 1e12:g}" for n in numbers[:2]), f"{numbers[2] / 1e9:g}"])
    cells[-1] += [note, source]
  header = ["device", "int8 (TOP/s)", "4 bits (TOP/s)", "GB/s", "what 4 bits save", "source"]
  return tables.markdown_table(header, cells)


def _milliseconds(seconds: float | None) -> str:
  return tables.DASH if seconds is None else f"{1e3 * seconds:.4g}"
