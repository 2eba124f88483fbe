"""Tables of documents are those of their collected rows."""

import re

import pytest

from experiments.sweeps import documents
from flexiq_jax.runs.sweeps import collect

TABLE = "<!-- table: sweep_digits/group_size -->\n{}<!-- end of table -->"
CSV = """\
cell,status,reason,groups.group_size,seed,method,ratio,top1,commit
a,finished,,2,0,float,,99.0,abc
b,finished,,4,0,float,,98.0,abc{}
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "sweep_digits.csv").write_text(CSV.format(""))
  return tmp_path


def test_docs_are_those_of_their_rows():
  """Where this fails: python -m experiments.sweeps.documents."""
  assert documents.main(["--check"]) == 0


def test_every_number_of_the_results_has_its_cell():
  """What was carried by hand belongs to the other documents."""
  text = (documents.DOCS / "results.md").read_text()
  assert text.count("<!-- table:") >= 8
  by_hand = re.sub(r"<!-- table:.*?<!-- end of table -->", "", text, flags=re.DOTALL)
  assert not re.findall(r"^\|.*|\d\.\d", by_hand, flags=re.MULTILINE)


@pytest.mark.parametrize(
  "path", sorted((documents.DOCS / "tables").glob("*.csv")), ids=lambda path: path.stem
)
def test_kept_rows_are_of_the_config_that_a_cell_has_now_or_are_marked(path, tmp_path):
  """A field that came later and changes nothing belongs to `identity.LATER`."""
  cells = documents.plan(documents.bases.load(documents.config_of(path.stem)), tmp_path)
  now = {cell.name: collect.config_name(cell) for cell in cells}
  kept = [row for row in collect.read_csv(path) if row.get("config")]
  assert kept
  other = {row["cell"] for row in kept if row["config"] != now.get(row["cell"])}
  assert other == {row["cell"] for row in kept if row["reason"] == collect.ANOTHER}


def test_a_table_is_written_and_found_stale(folder):
  old = f"before\n\n{TABLE.format('')}\n\nafter\n"
  new = documents.rendered(old, folder)
  assert "| 2 | 99.00 | — |" in new and new.startswith("before\n\n") and new.endswith("\n\nafter\n")
  assert documents.rendered(new, folder) == new
  assert documents.rendered(new.replace("98.00", "98.01"), folder) == new


def test_a_variant_of_a_sweep_has_its_own_rows(folder):
  text = TABLE.format("").replace("sweep_digits/", "sweep_digits_runlocal/")
  with pytest.raises(ValueError, match=r"there is no .*sweep_digits_runlocal\.csv"):
    documents.rendered(text, folder)
  (folder / "sweep_digits_runlocal.csv").write_text(CSV.format("").replace("99.0", "12.0"))
  assert "| 2 | 12.00 | — |" in documents.rendered(text, folder)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      TABLE.format("").replace("/group_size", "/sizes"),
      "sizes: configs/sweep_digits.py has group_",
    ),
    (TABLE.format("").replace("sweep_digits/group_size", "clado/sizes"), "there is no .*clado.csv"),
    (TABLE.format("").replace("sweep_digits", "tabel7"), "did you mean configs/table7.py"),
    (TABLE.format("").replace("<!-- end of table -->", ""), "lacks its end"),
  ],
)
def test_wrong_markers_are_refused(folder, text, message):
  with pytest.raises(ValueError, match=message):
    documents.rendered(text, folder)


def test_rows_of_no_commit_are_not_taken(tmp_path):
  sweep = tmp_path / "sweep_digits"
  sweep.mkdir()
  (sweep / "results.csv").write_text(CSV.format("+changes"))
  with pytest.raises(ValueError, match="b: run with uncommitted changes"):
    documents.take(sweep, tmp_path / "tables")
  (sweep / "results.csv").write_text(CSV.format(""))
  taken = documents.take(sweep, tmp_path / "tables")
  assert taken.read_text() == CSV.format("")


def test_cells_that_were_not_run_keep_their_rows(tmp_path):
  folder, sweep = tmp_path / "tables", tmp_path / "sweep_digits"
  sweep.mkdir()
  cells = documents.plan(documents.bases.load("configs/sweep_digits.py"), sweep)
  first, second, third = (cell.name for cell in cells[:3])
  same = collect.config_name(cells[1])
  header = "cell,status,reason,method,top1,config,commit\n"
  results = sweep / "results.csv"
  results.write_text(
    f"{header}{first},finished,,float,99.0,old-1,abc\n{second},finished,,float,98.0,{same},abc\n"
    f"{third},waiting,,,,,\n"
  )
  with pytest.raises(ValueError, match=r"keep: there is no .*sweep_digits\.csv"):
    documents.take(sweep, folder, keep=True)
  documents.take(sweep, folder)
  results.write_text(
    f"{header}{first},waiting,,,,,\n{second},waiting,,,,,\n{third},finished,,float,97.5,x,def\n"
  )
  taken = documents.take(sweep, folder, keep=True)
  assert taken.read_text() == (
    f"{header}{first},finished,{collect.ANOTHER},float,99.0,old-1,abc\n"
    f"{second},finished,,float,98.0,{same},abc\n{third},finished,,float,97.5,x,def\n"
  )
  assert documents.take(sweep, folder).read_text() == results.read_text()
