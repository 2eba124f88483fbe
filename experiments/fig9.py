"""A load that moves, served by several systems: one row and one curve over time for each.

| row          | what serves                                                                  |
| ------------ | ---------------------------------------------------------------------------- |
| `load`       | FlexiQ, by the estimated load                                                |
| `predictive` | FlexiQ, by a forecast                                                        |
| `oracle`     | FlexiQ, with the arrivals known                                              |
| `int8`, `int4` | one model; INT4 with the accuracy of uniform INT4                          |
| `swapping`   | both of these, one at a time; a change loads a model                         |
| `layerwise`  | plans of a comparison's method, at the shares and accuracies of its rows     |

Columns: `median`, `p90`, `p99` in seconds over all requests, one without a result counting as
endless; `in_time`, share answered within the target; `mean_ratio` and `served_top1` over those
answered; `switches`; `refused`. `curves/NAME.csv` has the curve over time.
"""

import csv
import dataclasses
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.shared import accuracies, reporting, served, setup
from experiments.shared.checks import field
from flexiq_jax import serving
from flexiq_jax.runs import files, plots, process, report, tables
from flexiq_jax.runs.progress import Progress, duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import records, workloads

SYSTEMS = ("load", "predictive", "int8", "int4", "swapping", "oracle", "layerwise")
ARRIVALS = ("trace", "bursts", "gamma")
_COLUMNS = ("median", "p90", "p99", "in_time", "mean_ratio", "switches", "refused", "requests")
_CURVE = ("second", "rate", "ratio", "median", "top1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs(served.Inputs):
  """The same with what only this experiment reads.

  Attributes:
    counts: requests a second of the trace; None where arrivals are of another kind.
    plans: layer-wise plans with their accuracies, None where they do not run.
  """

  counts: np.ndarray | None
  plans: accuracies.Plans | None


def describe(config) -> str:
  """The layer table of a config's model."""
  _check(config)
  return reporting.layer_text(setup.describe(config))


def prepare(config) -> Inputs:
  """Checks a config, opens its profile and its trace; nothing is written."""
  _check(config)
  part, counts, plans = config.fig9, None, None
  if part.arrivals == "trace":
    with field("config.fig9.trace"):
      counts = workloads.read_trace(part.trace)
  if "layerwise" in part.systems:
    with field("config.fig9.layerwise"):
      plans = accuracies.of_plans(part.layerwise, part.layerwise_method)
  common = served.prepare(config, "fig9")
  if plans and common.profile:
    with field("config.serving.profile"):
      for share in plans.top1:
        common.profile.latencies(share, config.serving.size)
  fields = {f.name: getattr(common, f.name) for f in dataclasses.fields(common)}
  return Inputs(**fields, counts=counts, plans=plans)


def run(inputs: Inputs, workdir: Workdir, command: str) -> Path:
  """Simulates all systems; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  profile = served.profile_of(inputs, workdir)
  times = arrivals(inputs, served.capacity(inputs, profile))
  (workdir.path / "curves").mkdir(exist_ok=True)
  with Progress("fig9, systems", len(config.fig9.systems)) as progress:
    for name in config.fig9.systems:
      curve = workdir.path / "curves" / f"{name}.csv"
      if not (workdir.has(name, None, config.seed) and curve.is_file()):
        record, accuracy = _serve(inputs, profile, name, times)
        found = serving.summary(record, target=config.serving.target, accuracy=accuracy)
        files.write_text(curve, _curve(record, accuracy, config.fig9.bin))
        values = {column: found[column] for column in _COLUMNS}
        workdir.row(name, None, config.seed, **values, served_top1=found["accuracy"])
      progress.update(note=name)
  path = _report(inputs, workdir, command, profile, time.monotonic() - started)
  workdir.finish()
  return path


def arrivals(inputs: Inputs, capacity: float) -> np.ndarray:
  """The config's arrivals, float64 `[N]` seconds.

  Args:
    inputs: of the run.
    capacity: what INT8 sustains, requests a second.
  """
  part, seed = inputs.config.fig9, inputs.config.seed
  low, high = part.low * capacity, part.high * capacity
  if inputs.counts is not None:
    rates = workloads.rescale(inputs.counts, low, high, mean_over=min(10, len(inputs.counts)))
    return workloads.trace(rates, seed, seconds=part.seconds or None)
  if part.arrivals == "bursts":
    return workloads.bursts(low, high, part.seconds, seed)
  return workloads.gamma((low + high) / 2, part.seconds, part.cv, seed)


def _serve(
  inputs: Inputs, profile: serving.Profile, name: str, times: np.ndarray
) -> tuple[records.Record, Mapping[float, float]]:
  """The record of one system, and its accuracy by ratio."""
  part, config = inputs.config.serving, inputs.config
  ends, curve = (profile.ratios[0], profile.ratios[-1]), inputs.accuracy
  int8 = curve.get(profile.ratios[0]) if curve else None
  models, plans = {}, inputs.plans.top1 if inputs.plans else {}
  if int8 is not None and inputs.int4 is not None:
    models = {ends[0]: int8, ends[1]: inputs.int4}
  options = {
    "int8": ("fixed", {"ratio": ends[0]}, curve),
    "int4": ("fixed", {"ratio": ends[1]}, models),
    "swapping": ("swapping", {"levels": ends, "load_s": config.fig9.load_s}, models),
    "oracle": ("oracle", {"arrivals": times}, curve),
    "layerwise": (
      "layerwise",
      {
        "levels": tuple(plans),
        "load_s": config.fig9.load_s,
        "share": config.fig9.share,
      },
      plans,
    ),
  }
  kind, more, accuracy = options.get(name, (name, {}, curve))
  controller = serving.create(kind, profile, target=part.target, largest=part.size, **more)
  record = serving.simulate(
    times, controller, profile=profile, batching=inputs.batching, queue=part.queue
  )
  return record, accuracy


def _curve(record: records.Record, accuracy: Mapping[float, float], width: float) -> str:
  """The curve over time as CSV; an empty cell is no value."""
  end = float(record.arrival[-1]) if len(record.arrival) else width
  bins = np.arange(math.ceil(end / width) + 1) * width
  counts = np.diff(record.arrival.searchsorted(bins)) / width
  top1 = np.full(len(record.ratio), np.nan)
  if accuracy:
    top1 = records.interpolated(accuracy, record.ratio)
  columns = [
    *(bins[:-1] + width / 2, counts),
    records.over_time(record, bins, record.ratio, "mean"),
    # One without a result is endless: where most are, so is the median.
    records.over_time(record, bins, record.latency, "median"),
    records.over_time(record, bins, top1, "mean"),
  ]
  text = io.StringIO()
  out = csv.writer(text, lineterminator="\n")
  out.writerow(_CURVE)
  for row in zip(*columns, strict=True):
    out.writerow(["" if math.isnan(value) else f"{value:.6g}" for value in row])
  return text.getvalue()


def _check(config) -> None:
  served.check(config, "fig9")
  part = config.fig9
  for name in part.systems:
    if name not in SYSTEMS:
      raise ValueError(f"config.fig9.systems: {name!r} is not one of {', '.join(SYSTEMS)}")
  if not part.systems:
    raise ValueError("config.fig9.systems: empty; name at least one")
  if "layerwise" in part.systems and not part.layerwise:
    raise ValueError("config.fig9.layerwise: empty; the workdir of a finished comparison is needed")
  if part.arrivals not in ARRIVALS:
    raise ValueError(f"config.fig9.arrivals: {part.arrivals!r} is not one of {', '.join(ARRIVALS)}")
  if part.seconds < 0 or (part.arrivals != "trace" and part.seconds == 0):
    raise ValueError(f"config.fig9.seconds: {part.seconds}; positive seconds are accepted")
  if not 0 <= part.low <= part.high:
    raise ValueError(
      f"config.fig9.low, high: {part.low}, {part.high}; 0 <= low <= high is accepted"
    )
  if not part.bin > 0:
    raise ValueError(f"config.fig9.bin: {part.bin}; positive seconds are accepted")


def _report(inputs: Inputs, workdir: Workdir, command: str, profile, seconds: float) -> Path:
  config, rows = inputs.config, workdir.rows()
  curves = {name: _read(workdir.path / "curves" / f"{name}.csv") for name in config.fig9.systems}
  first = next(iter(curves.values()))
  latency = "median latency (ms)"
  panels = {
    "4-bit ratio (%)": {n: 100 * c["ratio"] for n, c in curves.items()},
    latency: {n: 1e3 * c["median"] for n, c in curves.items()},
  }
  known = {n: c["top1"] for n, c in curves.items() if not np.isnan(c["top1"]).all()}
  if known:
    panels["top-1 of\nanswers (%)"] = known
  what = Path(config.fig9.trace).stem if config.fig9.arrivals == "trace" else config.fig9.arrivals
  picture = plots.load_over_time(
    *(workdir.path / "fig9.png", first["second"], first["rate"], panels),
    title=f"{config.model}, {what}, simulated ({profile.source} latencies)",
    capacity=served.capacity(inputs, profile),
    logarithmic=(latency,),
  )
  return report.write(
    workdir.path,
    title=f"A load that moves: {config.model}, {what}",
    summary={
      "model": config.model,
      "profile": f"{profile.source}, {profile.device}",
      "arrivals": what,
      "load": f"{config.fig9.low:g} to {config.fig9.high:g} of what INT8 sustains, "
      f"{served.capacity(inputs, profile):,.0f} a second",
      "largest batch": config.serving.size,
      "delay (s)": config.serving.delay,
      "target (s)": config.serving.target,
      "wall time": duration(seconds),
    },
    rows=[],
    layers=[],
    plots=[("Arrivals, 4-bit ratio, median latency and accuracy over time", picture)],
    notes=[
      *served.notes(inputs, profile),
      *([inputs.plans.source] if inputs.plans else []),
      f"`swapping` loads a model in {config.fig9.load_s:g} s, in which nothing is served.",
      "The paper's figures of this kind, by a third-party note: median 100 to 150 ms, INT8 up to "
      "660 ms, mean accuracy 84.64 against 84.72 %. "
      "Its controller, batching and model are not known.",
    ],
    command=command,
    sections=[("Systems", _table(rows)), ("Beside INT4, INT8 and the oracle", _ratios(rows))],
  )


def _read(path: Path) -> dict[str, np.ndarray]:
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  return {name: np.array([float(row[name] or "nan") for row in rows]) for name in _CURVE}


def _table(rows) -> str:
  shown = plots.looks([row["method"] for row in rows])
  header = ["system", "median (ms)", "p90 (ms)", "p99 (ms)", "in time (%)", "mean 4-bit ratio (%)"]
  header += ["top-1 of answers (%)", "switches", "refused"]
  cells = [
    [
      shown[r["method"]].name,
      *(served.milliseconds(r[name]) for name in ("median", "p90", "p99")),
      f"{100 * r['in_time']:.2f}",
      tables.DASH if r["mean_ratio"] is None else f"{100 * r['mean_ratio']:.1f}",
      tables.number(r.get("served_top1"), 3),
      *(f"{r[name]:,}" for name in ("switches", "refused")),
    ]
    for r in rows
  ]
  return tables.markdown_table(header, cells)


def _ratios(rows) -> str:
  """How FlexiQ's controllers stand to the models and to the oracle."""
  of = {row["method"]: row for row in rows}
  cells = []
  for name in ("load", "predictive", "oracle"):
    if name not in of:
      continue
    row, cell = of[name], [plots.looks([name])[name].name]
    four, eight, oracle = of.get("int4"), of.get("int8"), of.get("oracle")
    cell.append(f"{row['median'] / four['median']:.2f}" if four else tables.DASH)
    both = (row.get("served_top1"), eight and eight.get("served_top1"))
    cell.append(tables.DASH if None in both else f"{both[1] - both[0]:.3f}")
    cell.append(f"{row['in_time'] / oracle['in_time']:.3f}" if oracle else tables.DASH)
    cells.append(cell)
  header = ["system", "median over INT4's", "points of top-1 below INT8"]
  return tables.markdown_table([*header, "share in time over the oracle's"], cells)
