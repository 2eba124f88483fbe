"""Writes the tables of README.md and docs/ from collected files, and tells where they are stale.

    python -m experiments.sweeps.documents --take runs/table7   # a sweep's rows into docs/tables/
    python -m experiments.sweeps.documents --take runs/table7 --keep    # cells not run keep theirs
    python -m experiments.sweeps.documents                      # rewrites all tables
    python -m experiments.sweeps.documents --check              # only says which are stale

A table stands between `<!-- table: SWEEP/TABLE -->` and `<!-- end of table -->`. Its rows are those
of `docs/tables/SWEEP.csv`, laid out as the table TABLE of `configs/SWEEP.py`; that of a variant, as
`configs/table2.py:folder`, is called `table2_folder`. Nothing is run.
"""

import argparse
import re
import sys
from pathlib import Path

from experiments.sweeps import bases
from experiments.sweeps.plan import plan
from experiments.sweeps.tables import layouts
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps import collect
from flexiq_jax.runs.sweeps import layouts as laid

DOCS = bases.ROOT / "docs"
_END = "<!-- end of table -->"
_MARK = re.compile(rf"(<!-- table: (\w+)/(\w+) -->\n)(.*?)({_END})", re.DOTALL)


def rendered(text: str, folder: Path) -> str:
  """A document with all its tables written anew.

  Args:
    text: the document.
    folder: that holds `SWEEP.csv`.

  Raises:
    ValueError: a marker is alone, or names a sweep, a table or a file that is not there.
  """
  if text.count("<!-- table:") != len(_MARK.findall(text)):
    raise ValueError(f"a table lacks its end, {_END!r}, or its name is not SWEEP/TABLE")

  def table(match: re.Match) -> str:
    sweep, name = match[2], match[3]
    found = layouts(bases.load(config_of(sweep)))
    if name not in found:
      raise ValueError(f"table {sweep}/{name}: configs/{sweep}.py has {', '.join(found)}")
    path = folder / f"{sweep}.csv"
    if not path.is_file():
      raise ValueError(f"table {sweep}/{name}: there is no {path}; --take a finished sweep")
    return f"{match[1]}\n{laid.markdown(found[name], collect.read_csv(path))}\n\n{match[5]}"

  return _MARK.sub(table, text)


def config_of(sweep: str) -> str:
  """The config of a sweep by its name, which a variant has after its last underscore."""
  name, _, variant = sweep.rpartition("_")
  whole = f"configs/{sweep}.py"
  if name and not (bases.ROOT / whole).is_file() and (bases.ROOT / f"configs/{name}.py").is_file():
    return f"configs/{name}.py:{variant}"
  return whole


def take(sweep: Path, folder: Path, keep: bool = False) -> Path:
  """Copies the rows of a sweep's folder to those of the documents.

  Args:
    sweep: the folder, named after the sweep.
    folder: that holds `SWEEP.csv`.
    keep: whether cells that are not finished here keep the rows that were taken of them before;
      those of another config than the cell's now are marked.

  Raises:
    ValueError: rows were made with changes that no commit has, or there are none to keep.
  """
  rows = collect.read_csv(sweep / "results.csv")
  changed = dict.fromkeys(r["cell"] for r in rows if (r.get("commit") or "").endswith("+changes"))
  if changed:
    raise ValueError(f"{', '.join(changed)}: run with uncommitted changes; run them from a commit")
  path = folder / f"{sweep.name}.csv"
  if keep:
    if not path.is_file():
      raise ValueError(f"keep: there is no {path}; --take without it")
    cells = plan(bases.load(config_of(sweep.name)), sweep)
    rows = collect.kept(rows, collect.read_csv(path), cells)
  folder.mkdir(exist_ok=True)
  return files.write_text(path, collect.to_csv(rows))


def main(argv: list[str]) -> int:
  """Does what the arguments say; returns the exit status."""
  parser = argparse.ArgumentParser(description="Tables of documents from docs/tables/*.csv.")
  parser.add_argument("--take", type=Path, metavar="RUNS/SWEEP", help="take over a sweep's rows")
  parser.add_argument("--check", action="store_true", help="write nothing; fail where stale")
  parser.add_argument("--keep", action="store_true", help="with --take: rows of cells not run here")
  options = parser.parse_args(argv)
  if options.keep and not options.take:
    parser.error("--keep belongs to --take")
  if options.take:
    print(take(options.take, DOCS / "tables", options.keep))
  stale = 0
  for path in (bases.ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
    old = path.read_text()
    new = rendered(old, DOCS / "tables")
    if new == old:
      continue
    stale += 1
    if options.check:
      print(f"{path}: its tables are stale; run python -m experiments.sweeps.documents")
    else:
      print(files.write_text(path, new))
  return int(options.check and stale > 0)


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
