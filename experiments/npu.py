"""A cycle model of an NPU: all models by ratio, arrays where 4 bits stop paying, layers of a model.

Rows: `MODEL R x C, F a cell, batch B` at each ratio, with the columns `cycles`, `compute`, `dram`
(see `npu.Cycles`), `gain` over 0 %, and `dram_bound`, the number of layers that wait for memory.
"""

import time
from pathlib import Path

from experiments.shared import reporting, setup, works
from experiments.shared.checks import field
from flexiq_jax.runs import process, report, tables
from flexiq_jax.runs.progress import Progress, duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import npu


def describe(config) -> str:
  """The layer table of a config's model."""
  _check(config)
  return reporting.layer_text(setup.describe(config))


def prepare(config) -> setup.Described:
  """Checks a config; nothing is written."""
  _check(config)
  return setup.describe(config)


def run(inputs: setup.Described, workdir: Workdir, command: str) -> Path:
  """Counts all cycles; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  part = config.npu
  own = works.of_module(inputs.module, inputs.selectable)
  here = (part.rows, part.columns)
  with Progress("npu, models", len(part.models) + 1) as progress:
    for name in part.models:
      if not all(_has(inputs, workdir, name, here, f, b) for f, b in _settings(config)):
        _count(inputs, workdir, name, works.of_name(name), here)
      progress.update(note=name)
    for shape in part.shapes:
      _count(inputs, workdir, f"own {config.model}", own, tuple(shape))
    progress.update(note=config.model)
  path = _report(inputs, workdir, command, own, time.monotonic() - started)
  workdir.finish()
  return path


def _settings(config) -> list[tuple[int, int]]:
  return [(factor, batch) for factor in config.npu.factors for batch in config.npu.batches]


def _method(name: str, shape, factor: int, batch: int) -> str:
  return f"{name} {shape[0]} x {shape[1]}, {factor} a cell, batch {batch}"


def _has(inputs, workdir: Workdir, name: str, shape, factor: int, batch: int) -> bool:
  method = _method(name, shape, factor, batch)
  return all(workdir.has(method, ratio, None) for ratio in inputs.settings.ratios)


def _array(config, shape, factor: int) -> npu.Array:
  part = config.npu
  return npu.Array(
    **{"rows": shape[0], "columns": shape[1], "factor": factor, "serial": part.serial},
    **{"bandwidth": part.bandwidth, "buffer": part.buffer},
    **{"low_bytes": part.low_bytes, "clock": part.clock},
  )


def _count(inputs, workdir: Workdir, name: str, layers: works.Works, shape) -> None:
  """The rows of one model on one array."""
  for factor, batch in _settings(inputs.config):
    if _has(inputs, workdir, name, shape, factor, batch):
      continue
    array, first = _array(inputs.config, shape, factor), 0
    for ratio in inputs.settings.ratios:
      each = [npu.cycles(array, w, works.boundary(w, low, ratio), batch) for w, low in layers]
      total = sum(c.total for c in each)
      first = first or total
      workdir.row(
        *(_method(name, shape, factor, batch), ratio, None),
        cycles=total,
        compute=sum(c.compute for c in each),
        dram=sum(c.dram for c in each),
        dram_bound=sum(c.bound == "DRAM" for c in each),
        gain=first / total,
      )


def _check(config) -> None:
  works.check(config, "npu")
  part = config.npu
  for shape in ((part.rows, part.columns), *part.shapes):
    if len(shape) != 2:
      raise ValueError(f"config.npu.shapes: {shape}; (rows, columns) are accepted")
    for factor in part.factors:
      with field("config.npu", config.npu):
        _array(config, shape, factor)


def _report(inputs, workdir: Workdir, command: str, own: works.Works, seconds: float) -> Path:
  config, rows = inputs.config, workdir.rows()
  part, of = config.npu, {(r["method"], r["ratio"]): r for r in rows}
  here = (part.rows, part.columns)
  sections = []
  for factor, batch in _settings(config):
    title = f"Gain over 0 %: {here[0]} x {here[1]}, {factor} weights a cell, batch {batch}"
    sections.append((title, _by_model(inputs, of, here, factor, batch)))
  sections.append((f"{config.model}: gain of 100 % by array", _by_shape(inputs, of)))
  sections.append((f"{config.model}: cycles of its layers", _by_layer(inputs, own)))
  low = sum(low for _, low in own)
  array = _array(config, here, part.factors[0])
  changed = npu.switch_cycles(array, low)
  return report.write(
    workdir.path,
    title=f"Cycles on an NPU's array ({config.model} and others)",
    summary={
      "array": f"{here[0]} x {here[1]}",
      "DRAM bytes a cycle": part.bandwidth,
      "activation buffer (KiB)": part.buffer // 1024,
      "a change of the ratio": f"{changed} cycles for {low} layers, "
      f"{1e6 * changed / part.clock:.2f} µs at {part.clock / 1e6:g} MHz",
      "wall time": duration(seconds),
    },
    rows=[],
    layers=[],
    plots=[],
    notes=[
      "Modelled (see `flexiq_jax/serving/npu.py`); no NPU ran. Compute cycles are those of "
      "SCALE-Sim 3; 4-bit folds "
      + ("take as long to fill as an array of so many rows." if part.serial else "fill at once."),
      "Each selectable layer has the ratio's share of its channels in 4 bits; a recipe's shares "
      "differ between layers. First and last layers keep 8 bits.",
      "Depthwise layers and attention's products of activations are not counted.",
    ],
    command=command,
    sections=sections,
  )


def _by_model(inputs, of, shape, factor: int, batch: int) -> str:
  ratios, cells = inputs.settings.ratios, []
  for name in inputs.config.npu.models:
    line = [of[_method(name, shape, factor, batch), ratio] for ratio in ratios]
    bound = f"{line[0]['dram_bound']} / {line[-1]['dram_bound']}"
    cells.append([name, tables.si(line[0]["cycles"]), *(f"{r['gain']:.2f}" for r in line), bound])
  header = ["model", "cycles at 0 %", *(tables.percent(r) for r in ratios)]
  return tables.markdown_table([*header, "layers that wait for DRAM, 0 / 100 %"], cells)


def _by_shape(inputs, of) -> str:
  config, settings = inputs.config, _settings(inputs.config)
  last, cells, stopped = inputs.settings.ratios[-1], [], []
  for shape in config.npu.shapes:
    name = f"{shape[0]} x {shape[1]}"
    gains = []
    for factor, batch in settings:
      row = of[_method(f"own {config.model}", shape, factor, batch), last]
      gains.append(row["gain"])
      if row["gain"] < config.npu.least:
        stopped.append(f"{name} ({factor} a cell, batch {batch}: {row['gain']:.2f})")
    cells.append([name, *(f"{gain:.2f}" for gain in gains)])
  header = ["rows x columns", *(f"{factor} a cell, batch {batch}" for factor, batch in settings)]
  text = tables.markdown_table(header, cells)
  where = ", ".join(stopped) or "none of these arrays"
  return f"{text}\n\n4 bits stop paying, with a gain below {config.npu.least:g}, on {where}."


def _by_layer(inputs, own: works.Works) -> str:
  config, ratios = inputs.config, inputs.settings.ratios
  part = config.npu
  array, batch = _array(config, (part.rows, part.columns), part.factors[0]), part.batches[0]
  cells = []
  for work, low in own:
    each = [npu.cycles(array, work, works.boundary(work, low, ratio), batch) for ratio in ratios]
    sizes = [str(work.channels * work.window), str(work.outputs), str(work.pixels)]
    bound = f"{each[0].bound} / {each[-1].bound}"
    cells.append([work.name, *sizes, *(f"{c.total:,}" for c in each), bound])
  header = ["layer", "K", "N", "T", *(tables.percent(r) for r in ratios), "binds, 0 / 100 %"]
  return f"Batch {batch}, {part.factors[0]} weights a cell.\n\n" + tables.markdown_table(
    header, cells
  )
