"""The report and the tables of the console."""

import io
import re
import urllib.parse

import pytest

from flexiq_jax.runs import report
from flexiq_jax.runs.workdir import Workdir

ENVIRONMENT = {"python": "3.11.9", "system": "Linux x86_64", "backend": "cpu"}
LAYERS = [
  {
    "name": "stem/conv",
    "kind": "conv",
    "in_channels": 3,
    "out_channels": 16,
    "macs": 442_368,
    "parameters": 432,
    "groups": None,
    "bits": 8,
  },
  {
    "name": "blocks/0/conv1",
    "kind": "conv",
    "in_channels": 16,
    "out_channels": 16,
    "macs": 2_359_296,
    "parameters": 2304,
    "groups": 4,
    "bits": 4,
  },
  {"name": "head", "kind": "dense", "in_channels": 64, "out_channels": 10, "macs": 640, "bits": 8},
]
ROWS = [
  {"method": "float", "ratio": None, "seed": None, "top1": 91.5, "images": 10_000},
  {"method": "random", "ratio": 0.5, "seed": 0, "top1": 90.0, "drop_float": 1.5, "mac_share": 0.5},
  {"method": "random", "ratio": 0.5, "seed": 1, "top1": 91.0, "drop_float": 0.5, "mac_share": 0.5},
]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def write(workdir, **changes):
  arguments = {
    "title": "FlexiQ: resnet20 on CIFAR-10",
    "summary": {"text": "It works.", "model": "resnet20", "images": 10_000, "float_top1": 91.5},
    "rows": ROWS,
    "layers": LAYERS,
    "plots": [],
    "notes": [],
    "command": "python run.py --config=configs/digits.py",
    "environment": ENVIRONMENT,
  }
  return report.write(workdir, **arguments | changes).read_text()


def test_report_says_what_was_run(tmp_path):
  text = write(tmp_path)
  assert text.startswith("# FlexiQ: resnet20 on CIFAR-10\n\nIt works. Model resnet20; ")
  assert "images 10,000; float top1 91.50." in text
  assert "```sh\npython run.py --config=configs/digits.py\n```" in text
  assert "Environment: python 3.11.9; system Linux x86_64; backend cpu." in text


def test_report_asks_for_the_environment(tmp_path):
  assert re.search(r"Environment: python 3\.\d+\.\d+; jax \d", write(tmp_path, environment=None))


def test_results_are_means_over_seeds(tmp_path):
  lines = write(tmp_path).split("\n")
  assert (
    "| method | 4-bit ratio | top-1 (%) | drop from float | 4-bit MACs (%) | images | seeds |"
    in lines
  )
  assert "| float | — | 91.50 | — | — | 10,000 | 1 |" in lines
  assert "| random | 50 % | 90.50 ± 0.71 | 1.00 ± 0.71 | 50.0 | — | 2 |" in lines
  assert any("sample standard deviation" in line for line in lines)


def test_one_seed_is_not_called_a_mean(tmp_path):
  text = write(tmp_path, rows=ROWS[:2])
  assert "| random | 50 % | 90.00 | 1.50 | 50.0 | — |" in text
  assert "seeds" not in text


def test_layers_have_totals(tmp_path):
  text = write(tmp_path)
  assert "| blocks/0/conv1 | conv | 16 | 16 | 2.36 M | 2.30 k | 4 | 4 |" in text
  # (442368 * 8 + 2359296 * 4 + 640 * 8) / 2802304 = 4.63
  assert "| total | 3 layers |  |  | 2.80 M | 2.74 k | 4 | 4.63 |" in text


def test_links_lead_to_files(tmp_path):
  (tmp_path / "plots").mkdir()
  picture = tmp_path / "plots" / "top 1 [a].png"
  picture.write_bytes(b"png")
  picture.with_suffix(".pdf").write_bytes(b"pdf")
  Workdir(tmp_path).config({"a": 1})
  text = write(tmp_path, plots=[("Top-1 [all]", picture)])
  targets = re.findall(r"(?<!\\)\]\(([^)]+)\)", text)
  assert len(targets) == 5  # the picture as PNG and PDF, config.json, plots/, report.md
  for target in targets:
    assert (tmp_path / urllib.parse.unquote(target)).exists(), target
  assert r"![Top-1 \[all\]](plots/top%201%20%5Ba%5D.png)" in text
  assert "- [`config.json`](config.json): the config of the run, 13 B" in text
  assert "- [`plots/`](plots/): 2 files\n" in text


def test_notes_are_a_list(tmp_path):
  text = write(tmp_path, notes=["`head`: stays\n  8-bit", "second"])
  assert "## Notes\n\n- `head`: stays 8-bit\n- second\n" in text
  assert "## Notes" not in write(tmp_path)


def test_report_without_results(tmp_path):
  text = write(tmp_path, rows=[], layers=[], summary={})
  assert "## Results" not in text and "## Layers" not in text and "## Files" in text
  assert "\n\n\n" not in text


def test_missing_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"plot '.*a.png' \(Top-1\) is missing"):
    write(tmp_path, plots=[("Top-1", tmp_path / "a.png")])
  with pytest.raises(FileNotFoundError, match=r"workdir '.*none' is no folder"):
    write(tmp_path / "none")


def test_layer_table_lines_up():
  assert report.layer_table(LAYERS).split("\n") == [
    "name            kind       C   N    MACs  parameters  groups  bits",
    "--------------  --------  --  --  ------  ----------  ------  ----",
    "stem/conv       conv       3  16   442 k       432         —     8",
    "blocks/0/conv1  conv      16  16  2.36 M      2.30 k       4     4",
    "head            dense     64  10   640           —         —     8",
    "--------------  --------  --  --  ------  ----------  ------  ----",
    "total           3 layers          2.80 M      2.74 k       4  4.63",
  ]


def test_bits_as_text_have_no_mean():
  layers = [LAYERS[0], LAYERS[1] | {"bits": "4/8"}]
  lines = report.layer_table(layers).split("\n")
  assert lines[3].endswith(" 4/8") and lines[-1].endswith(" —")


def test_results_go_to_a_file_as_plain_text():
  stream = io.StringIO()
  report.print_results(ROWS, title="resnet20", stream=stream)
  lines = stream.getvalue().rstrip("\n").split("\n")
  assert lines[0] == "resnet20"
  last = " ".join(lines[-1].split())
  assert last == "random 50 % 90.50 ± 0.71 1.00 ± 0.71 50.0 — 2"
  assert "\x1b" not in stream.getvalue()
  assert len({len(line) for line in lines[1:]}) == 1


def test_results_go_to_a_terminal_in_style(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  report.print_results([ROWS[0] | {"method": "[red]"}, *ROWS[1:]], stream=stream)
  assert "\x1b[" in stream.getvalue()
  assert "90.50 ± 0.71" in stream.getvalue()
  assert "[red]" in stream.getvalue()
