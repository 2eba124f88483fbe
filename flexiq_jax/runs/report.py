"""`report.md` of a run and the tables that go to the console.

A report stands alone: what was run, on what, the results with their spread over seeds, pictures,
the layers, and what else the folder holds. It is Markdown as GitHub renders it.
"""

import os
import re
import sys
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.box
import rich.console
import rich.table
import rich.text

from flexiq_jax.runs import files, process, tables

FILES = {  # what the files of a workdir are, for the last section
  "config.json": "the config of the run",
  "metrics.jsonl": "events with time stamps, one JSON object per line",
  "results.csv": "the results, one row for each method, ratio and seed",
  "recipe.json": "the schedule, to evaluate or deploy without searching again",
  "finished": "marker: the run is complete",
  "report.md": "this report",
}

_RESULTS = (  # column, heading, decimals; shares are printed in %
  ("top1", "top-1 (%)", 2),
  ("drop_float", "drop from float", 2),
  ("drop_int8", "drop from INT8", 2),
  ("avg_bits", "average bits", 2),
  ("mac_share", "4-bit MACs (%)", 1),
  ("channel_share", "4-bit channels (%)", 1),
)
_LAYERS = ("name", "kind", "C", "N", "MACs", "parameters", "groups", "bits")


def write(
  workdir: str | os.PathLike[str],
  *,
  title: str,
  summary: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  layers: Sequence[Mapping[str, Any]],
  plots: Sequence[tuple[str, str | os.PathLike[str]]],
  notes: Sequence[str],
  command: str,
  environment: Mapping[str, Any] | None = None,
  sections: Sequence[tuple[str, str]] = (),
) -> Path:
  """Writes `report.md`; call it after the files that it lists.

  Args:
    workdir: folder of the run.
    title: heading, as `FlexiQ: resnet20 on CIFAR-10`.
    summary: facts for the first paragraph in order of interest, as `{"model": "resnet20", "images":
      10000}`; the key `text`, if there, holds whole sentences that open the paragraph.
    rows: results, see `workdir` for columns and units.
    layers: layer table, see `layer_table`.
    plots: (caption, path) of the pictures, the most important first; they should lie below the
      workdir. A caption's last full stop is added here.
    notes: Markdown remarks, as the contractions that were not quantized.
    command: the command line that made the run.
    sections: (heading, Markdown) of further tables, between results and pictures.
    environment: what `process.describe` gave; asked for here if None.

  Returns:
    The report's path.

  Raises:
    FileNotFoundError: the workdir or a picture is missing.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"workdir {str(workdir)!r} is no folder: make it before the report")
  for caption, path in plots:
    if not Path(path).is_file():
      raise FileNotFoundError(f"plot {str(path)!r} ({caption}) is missing: draw it first")
  environment = process.describe() if environment is None else environment
  pictures = [_picture(workdir, *plot) for plot in plots]
  # The first one says at a glance what the table says in numbers.
  parts = [f"# {title}", _paragraph(summary), *pictures[:1]]
  parts += ["Command:", f"```sh\n{command.strip()}\n```"]
  parts.append(f"Environment: {_facts(environment)}.")
  if rows:
    parts += ["## Results", tables.markdown_table(*_result_cells(rows)), _legend(rows)]
  for heading, text in sections:
    parts += [f"## {heading}", text]
  if pictures[1:]:
    parts += ["## Pictures", *pictures[1:]]
  if layers:
    parts += ["## Layers", tables.markdown_table(*_layer_cells(layers), left=2)]
    parts.append(
      "C and N: input and output channels. MACs: multiply-accumulates of one example. Groups: "
      "channel groups that can be 4-bit. The bits of the total are their mean over MACs."
    )
  if notes:
    parts += ["## Notes", "\n".join(f"- {' '.join(note.split())}" for note in notes)]
  parts += ["## Files", _files(workdir)]
  return files.write_text(workdir / "report.md", "\n\n".join(filter(None, parts)) + "\n")


def _picture(workdir: Path, caption: str, path: str | os.PathLike[str]) -> str:
  """A picture with its caption, of which the first sentence stands for it where it is not seen."""
  target = urllib.parse.quote(os.path.relpath(path, workdir))
  short = tables.escape(caption.partition(". ")[0])
  text = f"![{short}]({target})\n\n*{tables.escape(caption)}.*"
  pdf = Path(path).with_suffix(".pdf")
  if pdf.is_file():
    text += f" [PDF]({urllib.parse.quote(os.path.relpath(pdf, workdir))})"
  return text


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
  """The layers of a model as a plain table with a line of totals.

  Args:
    layers: one mapping per layer, from the input on, with `name`, `kind` (dense, conv, depthwise),
      `in_channels`, `out_channels`, `macs` of one example, `parameters` (their number), `groups`
      (channel groups, 0 or None in a layer that stays 8-bit) and `bits` (a number, or a text as
      `4/8`). What is missing or None is an empty cell.

  Returns:
    Lines without a line break at the end. The bits of the last line are the mean over MACs.
  """
  return tables.text_table(*_layer_cells(layers), left=2, totals=True)


def results_table(rows: Iterable[Mapping[str, Any]]) -> str:
  """The results as a plain table, mean ± spread over seeds.

  Args:
    rows: results, see `workdir` for columns and units.
  """
  return tables.text_table(*_result_cells(rows))


def print_results(
  rows: Iterable[Mapping[str, Any]], *, title: str = "results", stream: TextIO | None = None
) -> None:
  """Prints the results: with rules and colour on a terminal, else as a plain table.

  Args:
    rows: results, see `workdir` for columns and units.
    title: heading.
    stream: where to, standard output if None.
  """
  stream = sys.stdout if stream is None else stream
  if not stream.isatty():
    print(f"{title}\n{results_table(rows)}", file=stream, flush=True)
    return
  header, cells = _result_cells(rows)
  table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
  for i, name in enumerate(header):
    table.add_column(rich.text.Text(name), justify="right" if i else "left")
  for i, row in enumerate(cells):
    last = i + 1 == len(cells) or cells[i + 1][0] != row[0]
    table.add_row(*map(rich.text.Text, row), end_section=last)
  rich.console.Console(file=stream).print(table)


def _result_cells(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  joined = tables.aggregate(rows)
  # A column that nobody filled, as the drops of a run without a float model, is left out.
  columns = [c for c in _RESULTS if any(r.get(c[0]) is not None for r in joined)]
  seeds = any(record["seeds"] > 1 for record in joined)
  header = ["method", "4-bit ratio", *(heading for _, heading, _ in columns), "images"]
  cells = []
  for record in joined:
    row = [record["method"], tables.percent(record["ratio"], 1).replace(".0 %", " %")]
    for name, _, digits in columns:
      scale = 100 if name.endswith("_share") else 1
      mean, wide = (record.get(n) for n in (name, f"{name}_spread"))
      mean, wide = (None if v is None else scale * v for v in (mean, wide))
      # A column that the method fixes, as the bits at a ratio, has no spread worth printing.
      shown = wide if name == "top1" or (wide and round(wide, digits)) else None
      row.append(tables.mean_spread(mean, shown, digits))
    images = record.get("images")
    row.append(tables.DASH if images is None else f"{images:,.0f}")
    cells.append([*row, str(record["seeds"])] if seeds else row)
  return [*header, "seeds"] if seeds else header, cells


def _layer_cells(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
  cells = []
  for layer in layers:
    row = [tables.number(layer.get(name)) for name in ("name", "kind")]
    row += [tables.number(layer.get(name)) for name in ("in_channels", "out_channels")]
    row += [_aligned(layer.get(name)) for name in ("macs", "parameters")]
    row.append(str(layer.get("groups") or tables.DASH))
    bits = layer.get("bits")
    cells.append([*row, tables.number(bits)])
  total = [sum(layer.get(n) or 0 for layer in layers) for n in ("macs", "parameters", "groups")]
  sums = [_aligned(total[0]), _aligned(total[1]), str(total[2])]
  bits = [layer.get("bits") for layer in layers]
  mean = None  # of texts, as 4/8, there is none
  if total[0] and all(isinstance(b, int | float) for b in bits):
    products = (b * (layer.get("macs") or 0) for b, layer in zip(bits, layers, strict=True) if b)
    mean = float(sum(products) / total[0])
  kinds = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
  cells.append(["total", kinds, "", "", *sums, tables.number(mean)])
  return list(_LAYERS), cells


def _aligned(value: float | None) -> str:
  """An SI number that keeps the place of a prefix free, so that digits stand under digits."""
  text = tables.si(value)
  return text if text[-1].isalpha() else text + "  "


def _paragraph(summary: Mapping[str, Any]) -> str:
  text = " ".join(str(summary.get("text", "")).split())
  facts = _facts({name: value for name, value in summary.items() if name != "text"})
  return " ".join(part for part in (text, facts and f"{facts[0].upper()}{facts[1:]}.") if part)


def _facts(facts: Mapping[str, Any]) -> str:
  return "; ".join(
    f"{tables.escape(str(name).replace('_', ' '))} {tables.escape(_fact(value))}"
    for name, value in facts.items()
  )


def _fact(value: Any) -> str:
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
    return f"{value:,}"
  return tables.number(value)


def _legend(rows: Sequence[Mapping[str, Any]]) -> str:
  text = (
    "Drops are in percentage points, positive is worse. The 4-bit ratio is the share of MACs that "
    "was asked for, over the layers that may be 4-bit; the columns of shares say what was reached."
  )
  if any(record["seeds"] > 1 for record in tables.aggregate(rows)):
    text += " A ± B: mean and sample standard deviation over seeds."
  return text


def _files(workdir: Path) -> str:
  names = {p.name for p in workdir.iterdir() if not p.name.startswith(".")} | {"report.md"}
  lines = []
  for name in sorted(names):
    path = workdir / name
    if path.is_dir():
      count = sum(1 for p in path.rglob("*") if p.is_file())
      about = f"{count:,} file{'s' * (count != 1)}"
      name += "/"
    elif name == "report.md":
      about = FILES[name]
    else:
      size = tables.si(path.stat().st_size, "B")
      about = f"{FILES[name]}, {size}" if name in FILES else size
    link = urllib.parse.quote(name)
    lines.append(f"- [{_code(name)}]({link}): {about}")
  return "\n".join(lines)


def _code(text: str) -> str:
  """Inline code whose fence is longer than any row of backticks in the text."""
  fence = "`" * (1 + max((len(m) for m in re.findall("`+", text)), default=0))
  return f"{fence}{text}{fence}"
