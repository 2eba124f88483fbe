"""Latency against request rate at each ratio, and the rates that are sustained.

Rows: `rate R` is R requests a second; columns `median`, `p90` and `p99` in seconds, `in_time` (the
share within the target), `refused` (requests). `sustained` is the highest rate, in the column
`rate`, whose p90 is within the limit; it is bisected, each step being a run of its own.
"""

import functools
import time
from pathlib import Path

import numpy as np

from experiments.shared import reporting, served, setup
from flexiq_jax import serving
from flexiq_jax.runs import plots, process, report, tables
from flexiq_jax.runs.progress import Progress, duration
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import workloads

_COLUMNS = ("median", "p90", "p99", "in_time", "refused")


def describe(config) -> str:
  """The layer table of a config's model."""
  _check(config)
  return reporting.layer_text(setup.describe(config))


def prepare(config) -> served.Inputs:
  """Checks a config and opens its profile; nothing is written."""
  _check(config)
  return served.prepare(config, "fig8")


def run(inputs: served.Inputs, workdir: Workdir, command: str) -> Path:
  """Simulates all rates; arguments and result as `experiments.curve.run`."""
  started, config = time.monotonic(), inputs.config
  workdir.event("start", command=command, **process.describe())
  profile = served.profile_of(inputs, workdir)
  most = served.capacity(inputs, profile)
  rates = [round(share * most, 3) for share in config.fig8.rates]
  with Progress("fig8, runs", len(profile.ratios) * (len(rates) + 1)) as progress:
    for ratio in profile.ratios:
      for rate in rates:
        if not workdir.has(f"rate {rate:g}", ratio, config.seed):
          found = _serve(inputs, profile, ratio, rate)
          values = {name: found[name] for name in _COLUMNS}
          workdir.row(f"rate {rate:g}", ratio, config.seed, rate=rate, **values)
        progress.update(note=f"{100 * ratio:g} % at {rate:g}/s")
      if not workdir.has("sustained", ratio, config.seed):
        fine = functools.partial(_within, inputs, profile, ratio)
        rate = highest(fine, most, config.fig8.precision)
        workdir.row("sustained", ratio, config.seed, rate=rate)
      progress.update()
  path = _report(inputs, workdir, command, profile, time.monotonic() - started)
  workdir.finish()
  return path


def highest(fine, start: float, precision: float) -> float:
  """The highest rate that is fine, by bisection.

  Args:
    fine: rate -> whether; once it is not, it is not above either.
    start: a rate of the right size.
    precision: share of the rate at which the search ends.

  Returns:
    A rate that is fine; 0 where none from `start` / 1024 on is.
  """
  low, high = 0.0, start
  while fine(high) and high < 1e3 * start:
    low, high = high, 2 * high
  while high - low > precision * high and high > start / 1024:
    middle = (low + high) / 2
    low, high = (middle, high) if fine(middle) else (low, middle)
  return low


def _within(inputs: served.Inputs, profile: serving.Profile, ratio: float, rate: float) -> bool:
  return _serve(inputs, profile, ratio, rate)["p90"] <= inputs.config.serving.target


def _serve(inputs: served.Inputs, profile: serving.Profile, ratio: float, rate: float) -> dict:
  part, config = inputs.config.serving, inputs.config
  arrivals = workloads.poisson(rate, config.fig8.seconds, config.seed)
  controller = serving.create("fixed", profile, target=part.target, largest=part.size, ratio=ratio)
  record = serving.simulate(
    arrivals, controller, profile=profile, batching=inputs.batching, queue=part.queue
  )
  found = serving.summary(record, target=part.target)
  # Of no requests nobody waited.
  return found if found["requests"] else found | {"median": 0.0, "p90": 0.0, "p99": 0.0}


def _check(config) -> None:
  served.check(config, "fig8")
  part = config.fig8
  if not part.rates or any(not rate > 0 for rate in part.rates):
    raise ValueError(f"config.fig8.rates: {part.rates}; positive shares are accepted")
  if not part.seconds > 0:
    raise ValueError(f"config.fig8.seconds: {part.seconds}; positive seconds are accepted")
  if not 0 < part.precision < 1:
    raise ValueError(f"config.fig8.precision: {part.precision}; a share in 0..1 is accepted")


def _report(inputs, workdir, command, profile, seconds) -> Path:
  config, rows = inputs.config, workdir.rows()
  part = config.serving
  latencies = [row for row in rows if row["method"] != "sustained"]
  curves = {}
  for ratio in profile.ratios:
    own = sorted((r for r in latencies if r["ratio"] == ratio), key=lambda r: r["rate"])
    rate, median, p90 = (np.array([r[name] for r in own]) for name in ("rate", "median", "p90"))
    curves[ratio] = (rate, median, p90)
  picture = plots.latency_against_rate(
    workdir.path / "fig8.png",
    curves,
    title=f"{config.model}, Poisson arrivals, simulated ({profile.source} latencies)",
    limit=part.target,
    capacity=served.capacity(inputs, profile),
  )
  return report.write(
    workdir.path,
    title=f"Latency against request rate: {config.model}",
    summary={
      "model": config.model,
      "profile": f"{profile.source}, {profile.device}",
      "largest batch": part.size,
      "delay (s)": part.delay,
      "p90 limit (s)": part.target,
      "wall time": duration(seconds),
    },
    rows=[],
    layers=[],
    plots=[("Median and p90 latency against request rate, a line for each 4-bit ratio", picture)],
    notes=[
      *served.notes(inputs, profile),
      "The paper's Fig. 8, by a third-party note: 100 % sustains 1.57 times INT8's rate at a "
      "similar p90. The batching and the latencies behind that are not known.",
    ],
    command=command,
    sections=[
      ("Sustained rates", _sustained(rows)),
      ("Latency (ms): median / p90", _latencies(latencies, profile)),
    ],
  )


def _sustained(rows) -> str:
  own = {r["ratio"]: r["rate"] for r in rows if r["method"] == "sustained"}
  first = own[min(own)]
  cells = [
    [tables.percent(ratio), f"{rate:,.0f}", f"{rate / first:.2f}" if first else tables.DASH]
    for ratio, rate in sorted(own.items())
  ]
  header = ["4-bit ratio", "requests a second within the p90 limit", "relative to the first"]
  return tables.markdown_table(header, cells)


def _latencies(rows, profile) -> str:
  of = {(r["rate"], r["ratio"]): r for r in rows}
  shown = served.milliseconds
  cells = []
  for rate in sorted({r["rate"] for r in rows}):
    line = [of[rate, ratio] for ratio in profile.ratios]
    cells.append([f"{rate:,.0f}", *(f"{shown(r['median'])} / {shown(r['p90'])}" for r in line)])
  header = ["requests a second", *(tables.percent(r) for r in profile.ratios)]
  return tables.markdown_table(header, cells)
