"""Dependencies between our modules point one way, and the lower layers stay free of heavy imports.

The imports are read from the syntax trees, those inside functions and type-checking blocks too, so
nothing is executed. The two tables are the place to change when a direction is meant to change.
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
OURS = {
  "run": ("experiments", "flexiq_jax"),
  "configs": (),
  "experiments": ("flexiq_jax",),
  "experiments.shared": ("flexiq_jax",),
  "experiments.comparison": ("experiments.shared", "flexiq_jax"),
  "benchmarks": ("configs", "experiments", "flexiq_jax"),
  "examples": ("flexiq_jax",),
  "tests": ("*",),
  "flexiq_jax": (),
  "flexiq_jax.graph": (),
  "flexiq_jax.quant": ("flexiq_jax.graph",),
  "flexiq_jax.quant.quantizer": ("flexiq_jax.quant.lowering",),
  "flexiq_jax.quant.lowering": (),
  "flexiq_jax.orders": (),
  "flexiq_jax.runs": (),
  "flexiq_jax.models": (),
  "flexiq_jax.data": (),
  "flexiq_jax.evaluation": (),
  "flexiq_jax.kernels": _CODES,
  "flexiq_jax.kernels.tuning": ("flexiq_jax.kernels", *_CODES, "flexiq_jax.runs"),
  "flexiq_jax.network": _QUANT,
  "flexiq_jax.adaptive": _ORDERS,
  "flexiq_jax.calibrated": (*_ORDERS, "flexiq_jax.adaptive"),
  "flexiq_jax.search": (*_ORDERS, "flexiq_jax.runs"),
  "flexiq_jax.flexiq": (*_MODEL, "flexiq_jax.search"),
  "flexiq_jax.methods": (*_MODEL, "flexiq_jax.runs"),
  "flexiq_jax.methods.program": (),
  "flexiq_jax.methods.layerwise": _QUANT,
  "flexiq_jax.training": ("flexiq_jax.data", "flexiq_jax.runs"),
  "flexiq_jax.deploy": (*_MODEL, "flexiq_jax.kernels", "flexiq_jax.runs"),
  "flexiq_jax.serving": ("flexiq_jax.deploy", "flexiq_jax.runs"),
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
}

# Functions of the package take plain arguments; torch is an oracle of tests.
FORBIDDEN = {
  "flexiq_jax": ("absl.flags", "absl.app", "ml_collections", "torch", "tensorflow"),
  "experiments": ("absl.flags", "absl.app", "torch", "tensorflow"),
}

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
  ],
)
def test_lets_good_imports_pass(module, source):
  assert violations(module, source) == []
