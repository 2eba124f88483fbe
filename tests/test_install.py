"""`pip install .`: the wheel runs the seven lines where only what it asks for is installed."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("flexiq_jax", "requirements", "pyproject.toml", "README.md", "LICENSE")
EXTRAS = ("PIL", "matplotlib", "ml_collections", "sklearn", "starlette", "tensorflow_datasets")

# Everything that is installed and not asked for by the wheel is hidden; the wheel is on the path.
SCRIPT = """
import json, sys, time
hidden, wheel = json.loads(sys.argv[1]), sys.argv[2]

class Hider:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in hidden:
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hider())
sys.path.insert(0, wheel)
import jax
import jax.numpy as jnp
start = time.perf_counter()
import flexiq_jax as fq
print(time.perf_counter() - start)
assert fq.__file__.startswith(wheel), fq.__file__
assert "flexiq_jax.flexiq" not in sys.modules and "quantize" in dir(fq)

keys = jax.random.split(jax.random.key(0), 4)
params = {n: jax.random.normal(k, (6, 6)) for n, k in zip("abc", keys)}
x = jax.random.normal(keys[3], (8, 6))

def net(params, x):
  return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

model = fq.quantize(net, params, x, settings=fq.LowSettings(group_size=2))
model = fq.improve(model, settings=fq.SearchSettings(levels=(0.5,), rounds=0, probes=1))
print(model)
print(fq.evaluate(model, x, ratios=0.5))
model.save("model")
again = fq.load("model", net, params)
assert (again(x, 0.5) == model(x, 0.5)).all()
runner = fq.deploy(model, "artifact", sizes=(8,))
runner.switch(0.5)
assert jnp.allclose(runner(x), model(x, 0.5), atol=1e-4)
fq.export(model, "exported", batch_size=8, platforms=("cpu",))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, unpacked as an installer does, and what it asks for."""
  source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in SOURCES:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, source / name)
  build = f"from setuptools import build_meta; build_meta.build_wheel({str(made)!r})"
  subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
  (path,) = made.glob("*.whl")
  with zipfile.ZipFile(path) as file:
    file.extractall(made)
  (metadata,) = made.glob("*.dist-info")
  return made, importlib.metadata.PathDistribution(metadata).metadata


def asked_for(requirements, extras=("",)):
  """Names of the distributions that some requirements bring along."""
  found, todo = set(), [(r, extras) for r in requirements]
  while todo:
    text, extras = todo.pop()
    requirement = Requirement(text)
    marker, name = requirement.marker, canonicalize_name(requirement.name)
    if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
      continue
    key = (name, *sorted(requirement.extras))
    if key not in found:
      found.add(key)
      needs = importlib.metadata.requires(requirement.name) or []
      todo += [(need, ("", *requirement.extras)) for need in needs]
  return {name for name, *_ in found}


def test_wheel_has_what_it_needs_and_no_more(wheel):
  folder, metadata = wheel
  assert {path.name for path in folder.iterdir() if path.is_dir()} == {
    "flexiq_jax",
    f"flexiq_jax-{metadata['Version']}.dist-info",
  }
  assert (folder / "flexiq_jax/py.typed").is_file()
  assert (folder / "flexiq_jax/serving/server/page.html").is_file()
  assert {*metadata.get_all("Provides-Extra")} == {
    *("datasets", "experiments", "plots", "ray", "serve", "weights")
  }
  # All extras together are what `requirements.txt` names, but for one that is many machines' alone.
  lines = [line for p in (ROOT / "requirements").iterdir() for line in p.read_text().splitlines()]
  wanted = {Requirement(line).name for line in lines if not line.startswith("#")}
  assert {Requirement(r).name for r in metadata.get_all("Requires-Dist")} == wanted
  named = (ROOT / "requirements.txt").read_text()
  assert all(
    f"-r requirements/{p.name}" in named
    for p in (ROOT / "requirements").iterdir()
    if p.stem != "ray"
  )


def test_seven_lines_run_without_the_extras(wheel, tmp_path):
  folder, metadata = wheel
  allowed = asked_for(metadata.get_all("Requires-Dist"))
  installed = importlib.metadata.packages_distributions()
  hidden = sorted(
    module
    for module, owners in installed.items()
    if allowed.isdisjoint(canonicalize_name(owner) for owner in owners)
  )
  assert {*EXTRAS} <= {*hidden}
  # Compiled as a user's programs are, not as those of the tests (see conftest.py).
  own = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
  ended = subprocess.run(
    [sys.executable, "-I", "-c", SCRIPT, json.dumps(hidden), str(folder)],
    env={name: value for name, value in os.environ.items() if name not in own},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  assert float(ended.stdout.splitlines()[0]) < 0.3  # seconds that the import takes
