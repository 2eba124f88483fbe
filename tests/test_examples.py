"""The runnable examples: the README shows what they do, and they run."""

import contextlib
import functools
import io
import json
import pathlib
import re

import matplotlib
import numpy as np
import pytest

import flexiq_jax as fq

ROOT = pathlib.Path(__file__).parent.parent
SECTIONS = ("One's own model", "Deployment")
QUICK = fq.SearchSettings(levels=(0.5,), probes=1, rounds=0, candidates=1)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
  """The examples write into the present folder, and search for longer than they do here."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fq, "improve", functools.partial(fq.improve, settings=QUICK), raising=False)


def code(section):
  text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1]
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def test_readme_shows_the_example_as_it_is():
  assert (ROOT / "examples/own_model.py").read_text().split('"""\n\n', 1)[1] == code(SECTIONS[0])


def test_readme_runs(capsys):
  names = {}
  for section in SECTIONS:
    exec(code(section), names)
  said = capsys.readouterr().out
  assert "order   gram, seed 0" in said
  assert "agreement in %, 64 examples" in said
  model, runner, images = names["model"], names["runner"], names["images"]
  runner.switch(0.5)
  np.testing.assert_allclose(runner(images), model(images, 0.5), atol=1e-4)
  assert model.method == "gram"
  assert {path.name for path in pathlib.Path().iterdir()} == {"my_model", "artifact", "exported"}


def test_notebook_runs_and_says_what_it_says():
  notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
  assert kinds.count("display_data") == 2
  assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
  matplotlib.use("Agg")
  names = {}
  for cell in cells:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
      exec("".join(cell["source"]), names)
    stored = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
    # Numbers may differ where the machine rounds differently.
    assert re.sub(r"\d+", "0", said.getvalue()) == re.sub(r"\d+", "0", stored)
  assert len(names["plt"].get_fignums()) == 2
  names["plt"].close("all")
