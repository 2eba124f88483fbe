"""The runnable example is the one that the README shows, and it runs."""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).parent.parent


def test_readme_shows_the_example_as_it_is():
  lines = (ROOT / "examples/own_model.py").read_text().split('"""', 2)[2].strip()
  assert f"```python\n{lines}\n```" in (ROOT / "README.md").read_text()


def test_example_runs_and_errors_grow_with_the_ratio(capsys):
  runpy.run_path(str(ROOT / "examples/own_model.py"))
  errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
  assert len(errors) == 3
  assert 0 < errors[0] < errors[1] < errors[2] < 0.2
