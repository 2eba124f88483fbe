"""What the documents point to is there: files, folders, links, and the configs of commands."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("benchmarks", "configs", "docs", "examples", "experiments", "flexiq_jax")
SOURCES = (*FOLDERS, "requirements", "tests")


@functools.cache
def files() -> tuple[str, ...]:
  """Paths of all source files, from the root."""
  found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.*")]
  return tuple(f"/{path.relative_to(ROOT)}" for path in [*found, *ROOT.glob("*.*")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_folders_that_are_named_are_there(path):
  named = {*re.findall(r"`([\w/]+\.(?:py|md))`", path.read_text())}
  named |= {*re.findall(r"`((?:[a-z_]+/)+)`", path.read_text())}
  # What runs make, and what a device that was measured adds.
  made = (
    *("build/", "runs/", "train/", "recipes/", "calibration/", "pretrained_models/", "report.md"),
    *("docs/hardware/", "flexiq_jax/kernels/tiles/", "tiles/"),
  )
  missing = [
    name
    for name in sorted(named)
    if not name.startswith(made) and not any(f"/{name}" in file for file in files())
  ]
  assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())
  assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_configs_of_commands_are_there_and_have_the_fields(path):
  """`--config=configs/NAME.py:of=OTHER`, and every `--config.a.b=` is a field of some config."""
  text = path.read_text()
  for name, argument in re.findall(r"--config=configs/(\w+)\.py(?::([\w=,]+))?", text):
    if name != "NAME":
      assert (ROOT / f"configs/{name}.py").is_file(), name
    if other := re.search(r"of=(\w+)", argument):
      assert other[1] == "NAME" or (ROOT / f"configs/{other[1]}.py").is_file(), other[1]
  fields = {*re.findall(r"--config\.([a-z_0-9.]+)", text)}
  assert not sorted(fields - known_fields())


@functools.cache
def known_fields() -> frozenset[str]:
  """All fields that the experiments have."""
  found = set()

  def walk(config, front):
    for name, value in config.items():
      found.add(f"{front}{name}")
      if hasattr(value, "items"):
        walk(value, f"{front}{name}.")

  jobs = ("digits", "ablation", "compare_cifar10", "deploy", "serve", "sweep_digits")
  for name in (*jobs, "fig8", "fig9", "latency", "npu"):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    walk(module.get_config(), "")
  return frozenset(found)
