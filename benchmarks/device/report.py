"""Takes the results of `make device` into the project, and writes docs/hardware.md from them.

    python -m benchmarks.device.report build/device     # of one run, on a machine with accelerator
    python -m benchmarks.device.report                  # writes the page again

| from the run | to | how |
|---|---|---|
| `summary.json` | `docs/hardware/DEVICE.json` | step by step, what measured something |
| `profile*.json` | `docs/hardware/DEVICE.profile*.json` | whole |
| `tiles/DEVICE.json` | `flexiq_jax/kernels/tiles/DEVICE.json` | shape by shape |

A run of a CPU, or in small form, is no result and is refused.
"""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.device import profiles, records
from benchmarks.device.records import Record, Summary

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
TILES = ROOT / "flexiq_jax" / "kernels" / "tiles"
VERSION = 1

HEAD = """\
# On accelerators: what was measured

Every row below was written by a command from the files in `docs/hardware/`, none by hand. To
measure a device, on a machine that has one (Python 3.11 to 3.13, JAX for the device, flax, optax,
orbax-checkpoint, scikit-learn, matplotlib, pytest; torch and triton for the peers; no network):

```sh
make device-wheels                                # before, where there is a network
make device DEVICE_PYTHON=python3                 # eight minutes at most; into build/device/
python -m benchmarks.device.report build/device   # takes the results into the project
```

`make device` runs `python -m benchmarks.device`, each step in a process with a time limit of its
own, and writes `build/device/STEP.json` and `summary.json` after each. A step that fails or runs
out of time is told and the others go on; `python -m benchmarks.device --steps products,models`
runs some again. On a CPU it runs a small form of what needs no accelerator, which is no result. How
times are taken is told in `benchmarks/device/timing.py` and at the head of each step.
"""
NOTHING = "\nNo device has been measured yet.\n"


def slug(kind: str) -> str:
  """A device kind as part of a file name, as `kernels.tile_files` makes it."""
  return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def merged(old: dict[str, Any] | None, summary: Summary) -> dict[str, Any]:
  """The document of a device with a run's results in it.

  Args:
    old: the document so far.
    summary: of the run.

  Raises:
    ValueError: the run is no measurement of an accelerator, or of another device.
  """
  if not summary.measured:
    raise ValueError(
      f"summary: of {summary.machine['device_kind']!r}{' in small form' * summary.small}; runs of "
      "an accelerator at full size are accepted"
    )
  device = summary.machine["device_kind"]
  if old and old["device"] != device:
    raise ValueError(f"summary: of {device!r}; this is the document of {old['device']!r}")
  steps = dict(old["steps"]) if old else {}
  for record in summary.steps:
    if record.step in steps and not (record.result or {}).get("claims"):
      continue
    steps[record.step] = {
      "date": summary.date,
      "command": summary.command,
      "machine": summary.machine,
      # What a process printed names folders of the machine.
      "record": dataclasses.asdict(dataclasses.replace(record, tail="")),
    }
  return {"version": VERSION, "device": device, "steps": steps}


def render(documents: Sequence[dict[str, Any]]) -> str:
  """The text of docs/hardware.md."""
  if not documents:
    return HEAD + NOTHING
  parts = [HEAD]
  for document in sorted(documents, key=lambda d: d["device"]):
    lines = [f"\n## {document['device']}\n", "| claim | command | result | date |"]
    lines.append("| --- | --- | --- | --- |")
    for name, step in document["steps"].items():
      record = Record(**step["record"])
      commit = step["machine"].get("commit")
      date = step["date"] + (f", {commit}" if commit else "")
      command = f"`python -m benchmarks.device --steps {name}`"
      claims = (record.result or {}).get("claims", [])
      if record.status != "done":
        told = f"{record.status.replace('_', ' ')}: {record.why}"
        claims = [{"claim": f"step {name}", "result": told}, *claims]
      for one in claims:
        cells = (one["claim"], command, one["result"], date)
        lines.append(
          "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"
        )
    parts.append("\n".join(lines) + "\n")
  return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def documents(folder: pathlib.Path = DOCS / "hardware") -> list[dict[str, Any]]:
  """What was measured so far.

  Raises:
    ValueError: a file that is none of ours.
  """
  found = []
  for path in sorted(folder.glob("*.json")):
    if ".profile" in path.name:
      continue
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
      raise ValueError(f"{path}: version {document.get('version')!r}; {VERSION} is accepted")
    found.append(document)
  return found


def take(run: pathlib.Path, docs: pathlib.Path = DOCS, tiles: pathlib.Path = TILES) -> None:
  """Takes a run's files into the project."""
  summary = records.read_summary(run / "summary.json")
  name = slug(summary.machine["device_kind"])
  path = docs / "hardware" / f"{name}.json"
  old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
  records.write(path, merged(old, summary))
  for found in sorted(run.glob("profile*.json")):
    profile = profiles.to_dict(profiles.read(found))
    records.write(docs / "hardware" / f"{name}.{found.name}", profile)
  measured = run / "tiles" / f"{name}.json"
  if measured.is_file():
    from flexiq_jax.kernels import tile_files  # needs JAX; the page alone does not
    from flexiq_jax.runs import files

    kind = summary.machine["device_kind"]
    all_tiles = tile_files.load(tiles, kind) | tile_files.load(measured.parent, kind)
    tiles.mkdir(parents=True, exist_ok=True)
    files.write_text(tile_files.file_of(tiles, kind), tile_files.encode(kind, all_tiles))


def main(arguments: Sequence[str] | None = None) -> None:
  """Takes a run in, if one is named, and writes the page."""
  parser = argparse.ArgumentParser(description="Writes docs/hardware.md from measured results.")
  parser.add_argument("run", nargs="?", type=pathlib.Path, help="folder of make device's results")
  args = parser.parse_args(arguments)
  if args.run is not None:
    try:
      take(args.run)
    except (ValueError, OSError) as error:
      parser.exit(1, f"error: {error}\n")
  (DOCS / "hardware.md").write_text(render(documents()), encoding="utf-8")


if __name__ == "__main__":
  main()
