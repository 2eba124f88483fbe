"""Sweeps of the digits, and workdirs as their finished runs leave them."""

import json

from configs.shared import sweeps
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps.layouts import Layout

LAYOUT = Layout(title="x", rows="seed", columns=(("float", "method=float"),))
DIGITS = "configs/digits.py:runlocal"


def digits(**given):
  given = {"tables": {"t": LAYOUT}} | given
  bases_ = given.pop("bases", {"digits": sweeps.base(DIGITS)})
  return sweeps.sweep("s", bases_, **given)


def row_config(cell):
  """What the rows of a cell's run say of its config."""
  return f"{cell.config['name']}-{files.digest(cell.config)}"


def finish(cell, seconds: int = 60):
  """A workdir as a finished run leaves it."""
  cell.workdir.mkdir(parents=True)
  stamp = "2026-01-01T00:{:02d}:{:02d}.000+00:00"
  lines = [
    {"time": stamp.format(0, 0), "event": "start", "device_kind": "cpu", "jax": "1"},
    *({"time": stamp.format(0, i % 60), "event": "search", "best": i} for i in range(100)),
    {
      **{"time": stamp.format(seconds // 60, seconds % 60), "event": "done"},
      "peak_memory": {"host": 2**31},
    },
  ]
  config = row_config(cell)
  table = "method,ratio,seed,top1,model,config,commit\n" + "".join(
    f"flexiq_gram,{i / 20},{cell.labels['seed']},{90 - i},resnet8,{config},abc\n" for i in range(20)
  )
  (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
  (cell.workdir / "results.csv").write_text(table)
  (cell.workdir / "config.json").write_text(json.dumps(cell.config))
  (cell.workdir / "finished").write_text("{}")
