"""Dependencies between our modules point one way, and the lower layers stay free of heavy imports.

The imports are read from the syntax trees, those inside functions and type-checking blocks too, so
nothing is executed. The tables are the place to change when a direction is meant to change.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Module or package -> what of ours it may import, itself aside. The longest matching name rules, so
# a module needs its own line where it differs from its folder. `*` is everything of ours.
_CODES = ("flexiq_jax.quant.lowering", "flexiq_jax.quant.quantizer")
_QUANT = ("flexiq_jax.quant", "flexiq_jax.graph")
_ORDERS = (*_QUANT, "flexiq_jax.orders", "flexiq_jax.network")
_MODEL = (*_ORDERS, "flexiq_jax.adaptive", "flexiq_jax.calibrated")
_SEARCH = (
  *("flexiq_jax.search.archive", "flexiq_jax.search.fitness", "flexiq_jax.search.memory"),
  *("flexiq_jax.search.record", "flexiq_jax.search.settings", "flexiq_jax.runs"),
)
OURS = {
  "run": ("experiments", "flexiq_jax"),
  "configs": ("flexiq_jax",),
  "experiments": ("flexiq_jax",),
  "experiments.shared": ("flexiq_jax",),
  "experiments.comparison": ("experiments.shared", "flexiq_jax"),
  "experiments.sweeps": ("experiments.shared", "flexiq_jax"),
  "benchmarks": ("configs", "experiments", "flexiq_jax"),
  "examples": ("flexiq_jax",),
  "tests": ("*",),
  "flexiq_jax": (),
  "flexiq_jax.graph": (),
  "flexiq_jax.quant": ("flexiq_jax.graph",),
  "flexiq_jax.quant.quantizer": ("flexiq_jax.quant.lowering",),
  "flexiq_jax.quant.lowering": (),
  "flexiq_jax.orders": ("flexiq_jax.runs",),
  "flexiq_jax.runs": (),
  # Started as a script, before anything of ours can be imported.
  "flexiq_jax.runs.sweeps.launch": (),
  "flexiq_jax.models": (),
  "flexiq_jax.data": (),
  "flexiq_jax.evaluation": (),
  "flexiq_jax.kernels": _CODES,
  "flexiq_jax.kernels.tuning": ("flexiq_jax.kernels", *_CODES, "flexiq_jax.runs"),
  "flexiq_jax.network": _QUANT,
  "flexiq_jax.adaptive": (*_ORDERS, "flexiq_jax.models"),
  "flexiq_jax.calibrated": (*_ORDERS, "flexiq_jax.adaptive"),
  "flexiq_jax.search": (*_ORDERS, "flexiq_jax.runs"),
  "flexiq_jax.search.evolution": ("flexiq_jax.orders", *_SEARCH),
  "flexiq_jax.search.gram": (*_QUANT, "flexiq_jax.orders", *_SEARCH, "flexiq_jax.search.evolution"),
  "flexiq_jax.inputs": ("flexiq_jax.graph", "flexiq_jax.models"),
  "flexiq_jax.accuracy": (*_MODEL, "flexiq_jax.inputs", "flexiq_jax.runs"),
  "flexiq_jax.flexiq": (
    *(*_MODEL, "flexiq_jax.accuracy", "flexiq_jax.inputs", "flexiq_jax.runs"),
    *("flexiq_jax.search", "flexiq_jax.finetuning"),
  ),
  "flexiq_jax.deployed": (
    *(*_MODEL, "flexiq_jax.inputs", "flexiq_jax.runs", "flexiq_jax.deployment"),
  ),
  "flexiq_jax.methods": (*_MODEL, "flexiq_jax.training", "flexiq_jax.runs"),
  "flexiq_jax.methods.program": (),
  "flexiq_jax.methods.layerwise": _QUANT,
  "flexiq_jax.training": ("flexiq_jax.data", "flexiq_jax.runs"),
  "flexiq_jax.finetuning": (
    *(*_MODEL, "flexiq_jax.models", "flexiq_jax.runs"),
    *("flexiq_jax.search", "flexiq_jax.training"),
  ),
  "flexiq_jax.deployment": (*_MODEL, "flexiq_jax.kernels", "flexiq_jax.models", "flexiq_jax.runs"),
  "flexiq_jax.serving": ("flexiq_jax.deployment", "flexiq_jax.runs"),
  "flexiq_jax.serving.server": ("flexiq_jax.serving",),
  "flexiq_jax.serving.replicas": (),
}

# Module or package -> the only packages outside the standard library that it may import.
OUTSIDE = {
  "flexiq_jax.models": ("flax", "jax", "numpy"),
  "flexiq_jax.models.hub": ("huggingface_hub",),
  "flexiq_jax.models.weights": ("flax", "jax", "numpy", "safetensors", "huggingface_hub"),
  "flexiq_jax.quant": ("flax", "jax", "numpy"),
  "flexiq_jax.graph": ("flax", "jax", "numpy"),
  "flexiq_jax.kernels": ("flax", "jax", "numpy"),
  "flexiq_jax.methods.program": ("numpy", "scipy"),
  "flexiq_jax.serving.server": (
    *("numpy", "ml_dtypes", "msgspec", "PIL", "prometheus_client", "python_multipart"),
    *("starlette", "uvicorn", "uvloop"),
  ),
  "flexiq_jax.runs.sweeps": ("numpy", "rich", "submitit"),
}

# Functions of the package take plain arguments; torch is an oracle of tests.
FORBIDDEN = {
  "flexiq_jax": ("absl.flags", "absl.app", "ml_collections", "torch", "tensorflow"),
  "experiments": ("absl.flags", "absl.app", "torch", "tensorflow"),
}

# Package -> modules of it that are for use from outside, beside the names of its `__init__`. Nobody
# outside reaches past these.
FRONTS = {
  "flexiq_jax.data": (),
  "flexiq_jax.deployment": ("artifact", "export"),
  "flexiq_jax.finetuning": ("joint", "objective"),
  "flexiq_jax.graph": ("reorder", "tracing", "unfold"),
  "flexiq_jax.kernels": ("gpu", "tile_files", "tpu", "tuning"),
  "flexiq_jax.kernels.gpu": (),
  "flexiq_jax.kernels.tpu": (),
  "flexiq_jax.models": (),
  "flexiq_jax.orders": ("recipes", "weights"),
  "flexiq_jax.quant": (
    *("calibration", "exact", "grouping", "lowering", "quantizer", "rules", "straight"),
  ),
  "flexiq_jax.runs.plots": (),
  "flexiq_jax.search": ("evolution", "gram"),
  "flexiq_jax.search.evolution": (),
  "flexiq_jax.search.gram": (),
  "flexiq_jax.serving": (
    "batching",
    "latency",
    "npu",
    "profile",
    "profile_files",
    "records",
    "replicas",
    "server",
    "workloads",
  ),
  "flexiq_jax.serving.controllers": (),
  "flexiq_jax.serving.server": (),
  "flexiq_jax.training": ("classification", "loop"),
}
# Not asked: tests look inside.
INSIDERS = ("tests",)

FOLDERS = ("flexiq_jax", "experiments", "configs", "benchmarks", "examples")
ROOTS = (*FOLDERS, "run", "tests")


def inside(name: str, prefixes: tuple[str, ...]) -> bool:
  return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def longest(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
  return max((key for key in table if inside(module, (key,))), key=len, default=None)


def imports(module: str, source: str, package: bool = False) -> list[tuple[int, str]]:
  """(line, dotted name) of everything a module imports; `from a import b` counts as a.b."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = module.split(".")
        above = above[: len(above) - node.level + package]
        base = ".".join([*above, *([base] if base else [])])
      found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    elif isinstance(node, ast.Call) and node.args:
      # importlib.import_module("a.b") and __import__("a.b") with a constant name.
      called = node.func.attr if isinstance(node.func, ast.Attribute) else None
      called = node.func.id if isinstance(node.func, ast.Name) else called
      name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
      if called in ("import_module", "__import__") and isinstance(name, str):
        found.append((node.lineno, name))
  return found


def violations(module: str, source: str, package: bool = False) -> list[str]:
  """What a module imports and should not, one readable line for each."""
  key = longest(module, OURS)
  if key is None or (key == "flexiq_jax" and module != key):
    return [f"{module} has no line in OURS (tests/test_imports.py): say what it may import"]
  outside, forbidden = longest(module, OUTSIDE), longest(module, FORBIDDEN)
  bad = []
  for line, name in imports(module, source, package):
    ours = inside(name, ROOTS)
    if ours and "*" not in OURS[key] and not inside(name, (key, *OURS[key])):
      bad.append(f"{module}:{line} imports {name}; of ours it may import {OURS[key] or 'nothing'}")
    foreign = not ours and name.split(".")[0] not in sys.stdlib_module_names
    if foreign and outside and not inside(name, OUTSIDE[outside]):
      bad.append(f"{module}:{line} imports {name}; it may import {OUTSIDE[outside]}")
    if forbidden and inside(name, FORBIDDEN[forbidden]):
      bad.append(f"{module}:{line} imports {name}, which {forbidden} must not")
  return bad


def offered(package: str) -> set[str]:
  """What a package has for use from outside: the names of its `__init__`, and its open modules."""
  tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
  names = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
  ]
  return {*names[0], *FRONTS[package]}


def reached_past(module: str, source: str, package: bool = False) -> list[str]:
  """Imports that go past what a package offers, one readable line for each."""
  bad = []
  for line, name in imports(module, source, package):
    front = longest(name.rpartition(".")[0], FRONTS)
    if front is None or inside(module, (front, *INSIDERS)):
      continue
    module_of, _, last = name.removeprefix(f"{front}.").rpartition(".")
    of_open = module_of in FRONTS[front] and last not in offered(front)
    if not of_open and name.removeprefix(f"{front}.") not in offered(front):
      bad.append(f"{module}:{line} imports {name}, which {front} does not offer")
  return bad


def modules() -> list[tuple[str, pathlib.Path]]:
  paths = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
  paths += [p for p in (ROOT / "run.py",) if p.exists()]
  named = []
  for path in paths:
    parts = path.relative_to(ROOT).with_suffix("").parts
    named.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
  return named


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_directions(module, path):
  bad = violations(module, path.read_text(), package=path.name == "__init__.py")
  assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_nobody_reaches_past_what_a_package_offers(module, path):
  bad = reached_past(module, path.read_text(), package=path.name == "__init__.py")
  assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
  ("module", "source", "bad"),
  [
    ("flexiq_jax.network", "from flexiq_jax.quant import QModel, rules", 0),
    ("flexiq_jax.network", "from flexiq_jax.quant.rules import QModel", 1),
    ("flexiq_jax.quant.exact", "from flexiq_jax.quant.rules import QModel", 0),
    ("flexiq_jax.kernels.tuning", "from flexiq_jax.kernels.operands import Weights", 0),
    ("flexiq_jax.kernels.tuning", "from flexiq_jax.kernels.tpu.tiling import LANES", 1),
    ("benchmarks.kernels", "from flexiq_jax.kernels import tpu, operands", 1),
    ("benchmarks.kernels", "import flexiq_jax.kernels.tpu.sweeps", 1),
    ("tests.kernels.test_tpu", "from flexiq_jax.kernels.tpu import tiling", 0),
    ("flexiq_jax.search.run", "from flexiq_jax.search.gram.loop import run", 1),
    ("experiments.accuracy", "from flexiq_jax.search.evolution import keys", 1),
  ],
)
def test_catches_who_reaches_past(module, source, bad):
  assert len(reached_past(module, source)) == bad


def test_finds_our_modules():
  names = {name for name, _ in modules()}
  assert {"flexiq_jax", "flexiq_jax.runs.report", "flexiq_jax.runs.workdir"} <= names
  assert not any(name.endswith("__init__") for name in names)


@pytest.mark.parametrize(
  ("module", "source", "culprit"),
  [
    ("flexiq_jax.quant.lowering", "from flexiq_jax import graph", "flexiq_jax.graph"),
    ("flexiq_jax.quant.lowering", "from . import rules", "flexiq_jax.quant.rules"),
    ("flexiq_jax.quant.lowering", "from ..models.vit import ViT", "flexiq_jax.models.vit.ViT"),
    (
      "flexiq_jax.orders.greedy",
      "import flexiq_jax.quant.lowering",
      "flexiq_jax.quant.lowering",
    ),
    (
      "flexiq_jax.kernels.gpu.matmul",
      "def f():\n  import flexiq_jax.quant.rules",
      "flexiq_jax.quant.rules",
    ),
    ("flexiq_jax.graph", "if TYPE_CHECKING:\n  import run", "run"),
    ("flexiq_jax.data.cifar", "from flexiq_jax.models import resnet", "flexiq_jax.models.resnet"),
    ("flexiq_jax.models.vit", "import scipy.special", "scipy.special"),
    ("flexiq_jax.models.vit", "from safetensors import numpy", "safetensors.numpy"),
    ("flexiq_jax.methods.clado", "from absl import flags", "absl.flags"),
    ("flexiq_jax.runs.report", "import ml_collections", "ml_collections"),
    (
      "flexiq_jax.quant.rules",
      "importlib.import_module('flexiq_jax.serving')",
      "flexiq_jax.serving",
    ),
    ("experiments.accuracy", "import run", "run"),
    ("flexiq_jax.search.evolution.loop", "from flexiq_jax.search import gram", "search.gram"),
    ("configs.digits", "from experiments import accuracy", "experiments.accuracy"),
    ("flexiq_jax.newcomer", "", "OURS"),
  ],
)
def test_catches_violations(module, source, culprit):
  bad = violations(module, source)
  assert len(bad) == 1
  assert culprit in bad[0]
  assert module in bad[0]


def test_relative_import_of_a_package_counts_from_itself():
  source = "from . import lowering\nfrom .. import graph"
  names = [name for _, name in imports("flexiq_jax.quant", source, package=True)]
  assert names == ["flexiq_jax.quant.lowering", "flexiq_jax.graph"]


@pytest.mark.parametrize(
  ("module", "source"),
  [
    (
      "flexiq_jax.quant.quantizer",
      "import math\nfrom flexiq_jax.quant import lowering\nimport jax",
    ),
    ("flexiq_jax.models.weights", "import json\nfrom safetensors import numpy"),
    ("flexiq_jax.quant.calibration", "from flexiq_jax import graph, quant"),
    ("experiments.accuracy", "import ml_collections\nfrom flexiq_jax.orders import greedy"),
    ("flexiq_jax.methods.hawq", "from absl import logging"),
    ("flexiq_jax.search.gram.loop", "from flexiq_jax.search.gram import ties"),
    ("flexiq_jax.search.run", "from flexiq_jax.search import evolution, gram"),
    ("benchmarks.search", "from flexiq_jax.search.gram import Ties"),
  ],
)
def test_lets_good_imports_pass(module, source):
  assert violations(module, source) == []
