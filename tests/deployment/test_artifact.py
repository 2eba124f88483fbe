"""A deployed model on disk and as an export: the same results, and refusals."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import deployment, models
from flexiq_jax.deployment import artifact, document, export
from tests.deployment.deployed_for_test import (
  LEVELS,
  RESNET,
  SHAPES,
  VIT,
  made,
  ones_own,
  own_network,
)
from tests.mutants_for_test import MUTANTS, mutants_are_told

SPEC = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


@pytest.fixture(scope="module")
def small():
  return made(RESNET)


@pytest.fixture(scope="module")
def deployed(small):
  return deployment.deploy(small.model, small.x[:1], levels=LEVELS)


@pytest.fixture(scope="module")
def saved(deployed, tmp_path_factory):
  return artifact.save(tmp_path_factory.mktemp("saved") / "resnet", deployed, name="resnet8")


@functools.cache
def shapes_of(name, arguments):
  module = nnx.eval_shape(lambda: models.create(name, **dict(arguments)))
  return models.functional(module)


def abstract(case=RESNET):
  """The float model's code and shapes; there are no weights."""
  name, arguments = case
  return shapes_of(name, tuple(arguments.items()))


def load(path, **options):
  return artifact.load(path, *abstract(), SPEC, **options)


def test_loaded_model_runs_without_float_weights(saved, deployed, small):
  loaded = load(saved)
  assert jax.tree.structure(loaded.layers) == jax.tree.structure(deployed.layers)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(deployed), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  run = jax.jit(deployment.apply)
  for level in range(len(LEVELS)):
    np.testing.assert_array_equal(
      run(loaded, small.x, jnp.int32(level)), run(deployed, small.x, jnp.int32(level))
    )
  # Float parameters of layers are not there.
  assert not any("kernel" in path for path in loaded.floats)


def test_layers_without_a_kernel_are_kept(tmp_path):
  own, x = ones_own()
  deployed = deployment.deploy(own, x[:1], levels=LEVELS)
  path = artifact.save(tmp_path / "a", deployed, name="own")
  shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
  loaded = artifact.load(path, own_network, shapes, x[:1])
  assert loaded.layers["depthwise"].masks.shape == (len(LEVELS), 6)
  leaves = zip(jax.tree.leaves(loaded), jax.tree.leaves(deployed), strict=True)
  assert all(np.array_equal(a, b) for a, b in leaves)


def test_layers_between_two_others_are_kept(tmp_path):
  own, x = ones_own(depthwise=False)
  deployed = deployment.deploy(own, x[:1], levels=LEVELS)
  path = artifact.save(tmp_path / "a", deployed, name="own")
  shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
  loaded = artifact.load(path, own_network, shapes, x[:1])
  assert loaded.wiring.between == {"depthwise"}
  one = jax.jit(deployment.apply)(loaded, x, jnp.int32(3))
  np.testing.assert_allclose(one, own(x, 1.0), atol=1e-4 * np.std(one))


def test_sizes(saved, deployed, small):
  sizes = deployment.sizes(deployed, SPEC)
  counted = sum(np.asarray(w).size for w in small.model.network.weights.values())
  assert sizes.weights == counted
  assert sizes.float32 == 4 * sum(p.size for p in jax.tree.leaves(small.model.network.params))
  assert sizes.int8 == counted + sizes.float32 - 4 * counted
  assert sizes.codes < sizes.device < artifact.bytes_on_disk(saved) + sizes.device
  # 12 bits a weight, and layers that stay in 8 bits have 8.
  eight = sum(d.q.w.size for d in deployed.layers.values() if hasattr(d, "q"))
  assert sizes.codes == 1.5 * (counted - eight) + eight
  assert sizes.bits_per_weight == 8 * sizes.codes / counted


def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path, change):
  reseal(path, changed(path, change))


def changed(path, change):
  found = json.loads((path / "artifact.json").read_text())
  change(found)
  return found


def reseal(path, found):
  """Writes a document that says something else, whole in itself."""
  found["sha256"] = document.seal(found)
  (path / "artifact.json").write_text(document._text(found))


def test_refuses_other_versions_and_formats(saved, tmp_path):
  path = copy(saved, tmp_path)
  edit(path, lambda d: d.update(version=99))
  with pytest.raises(ValueError, match="version 99; this release reads 3"):
    load(path)
  edit(path, lambda d: d.update(format="other"))
  with pytest.raises(ValueError, match="no artifact"):
    load(path)
  (path / "artifact.json").write_text("{")
  with pytest.raises(ValueError, match="damaged: not JSON"):
    load(path)


def test_refuses_what_is_incomplete(saved, tmp_path):
  path = copy(saved, tmp_path)
  (path / "artifact.json").unlink()
  with pytest.raises(FileNotFoundError, match="written to its end"):
    load(path)
  shutil.copy(saved / "artifact.json", path)
  data = max(
    (p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  with pytest.raises(ValueError, match="is damaged"):
    load(path)
  (path / "arrays/0/_CHECKPOINT_METADATA").unlink()
  with pytest.raises(ValueError, match="incomplete"):
    load(path)
  shutil.rmtree(path / "arrays")
  with pytest.raises(ValueError, match="no folder `arrays`"):
    load(path)


def test_any_flipped_bit_is_refused(saved, tmp_path):
  path, rng = copy(saved, tmp_path), np.random.default_rng(0)
  load(path)
  files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
  for draw in range(500):
    file = files[draw % len(files)]
    whole = file.read_bytes()
    bit = int(rng.integers(8 * len(whole)))
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"^artifact: .*(damaged|no artifact|has version)"):
      load(path)
    file.write_bytes(whole)
  load(path)  # whole again


def told(path):
  """Loads what may be refused; (whether it was, with what message)."""
  try:
    load(path)
  except ValueError as error:
    return str(error)
  return ""


@pytest.mark.parametrize("count", MUTANTS)
def test_mutants_are_read_or_told(saved, tmp_path, count):
  """Whole in themselves, so that what they say is looked at."""
  path = copy(saved, tmp_path)
  found, template = json.loads((path / "artifact.json").read_text()), artifact.read(path).template()
  read = []

  def tried(made):
    if isinstance(made, dict):
      reseal(path, made)
    else:
      (path / "artifact.json").write_text(json.dumps(made))
    read.append((made, artifact.read(path).template()))

  mutants_are_told(found, tried, count, starts="artifact: ")
  assert 0.003 < len(read) / count < 0.5  # names, functions and digests may be others
  for one, of in read if count > 1000 else read[:5]:
    reseal(path, one)
    message = told(path)
    assert message.startswith("artifact: ") or not message
    # Other arrays than those of the files are none that may be loaded.
    same = jax.tree.leaves_with_path(of) == jax.tree.leaves_with_path(template)
    assert message or (same and one["files"] == found["files"])


def test_what_arrays_a_layer_has_is_as_its_class_says():
  for kind, fields in document._FIELDS.items():
    assert list(fields) == [f.name for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda d, e: e.update(signed="conv"),
      "layer NAME: signed: 'conv'; true or false is needed",
    ),
    (
      lambda d, e: e.update(channels=10**12),
      "layer NAME: channels: 1000000000000; an integer <= 2147483647 is needed",
    ),
    (
      lambda d, e: e.update(channels=10**6),
      "layer NAME: channels is 1000000; 1..36 are accepted in",
    ),
    (lambda d, e: e.update(channels=True), "layer NAME: channels: True; an integer is needed"),
    (lambda d, e: e.update(activation="tanh"), "layer NAME: activation: 'tanh' is not accepted"),
    (lambda d, e: e.update(type="Other"), "layer NAME: type: 'Other' is not accepted"),
    (lambda d, e: e.update(colour=1), "layer NAME: unknown field 'colour'"),
    (
      lambda d, e: e["scale"].update(shape=[10**9]),
      "scale is float32 [1000000000]; float32 [8] is",
    ),
    (
      lambda d, e: e["scale"].update(dtype="object"),
      "scale.dtype: 'object'; a text matching regex",
    ),
    (
      lambda d, e: e["weights"].update(block=9),
      "layer NAME: w8 has 72 rows; 18 are accepted, 2 bl",
    ),
    (lambda d, e: d["levels"].append(0.5), "levels: [0.0, 0.30000001192092896, 0.5, 1.0, 0.5] do"),
    (lambda d, e: d.update(levels=[]), "levels: []; a list of length >= 1 is needed"),
    (lambda d, e: d.update(dynamic=0), "dynamic: 0; true or false is needed"),
    (lambda d, e: d.update(more=0), "unknown field 'more'"),
    (lambda d, e: d.pop("folds"), "field 'folds' is missing"),
    (lambda d, e: d["files"].update(x="1"), "files[...]: {"),
  ],
)
def test_damage_is_told(saved, tmp_path, change, message):
  path, name = copy(saved, tmp_path), "layer1/0/conv1"
  edit(path, lambda d: change(d, d["arrays"]["layers"][name]))
  with pytest.raises(ValueError) as error:
    artifact.read(path)
  assert str(error.value).startswith(f"artifact: {path / 'artifact.json'} is damaged: ")
  assert message.replace("NAME", name) in str(error.value)
  assert str(error.value).endswith("; make it again from its recipe")


def test_documents_that_are_deep_or_say_a_thing_twice_are_refused(saved, tmp_path):
  path = copy(saved, tmp_path)
  file = path / "artifact.json"
  text = file.read_text()
  file.write_text(text.replace('"dynamic": false', '"dynamic": false,\n "dynamic": false'))
  with pytest.raises(ValueError, match="it is not what was written"):
    artifact.read(path)
  file.write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
  with pytest.raises(ValueError, match="not JSON"):
    artifact.read(path)


def test_another_models_arrays_are_refused(saved, deployed, tmp_path):
  path = copy(saved, tmp_path)
  name = "layer1/0/conv1"
  layer = deployed.layers[name]
  other = deployed.replace(layers=deployed.layers | {name: layer.replace(scale=2 * layer.scale)})
  artifact.save(tmp_path / "other", other, name="resnet8")
  shutil.rmtree(path / "arrays")
  shutil.copytree(tmp_path / "other/arrays", path / "arrays")
  with pytest.raises(ValueError, match=r"(damaged|incomplete): arrays/"):
    load(path)
  shutil.rmtree(path)
  path = copy(saved, tmp_path)
  (path / "arrays/more").write_text("x")
  with pytest.raises(ValueError, match="damaged: arrays/more is not what was written"):
    load(path)


def test_refuses_other_shapes_models_boundaries_and_folders(saved, deployed, tmp_path):
  path = copy(saved, tmp_path)
  name = "layer1/0/conv1"
  edit(path, lambda d: d["arrays"]["layers"][name]["scale"].update(shape=[3]))
  with pytest.raises(ValueError, match=r"damaged.*scale"):
    load(path)
  other = abstract(("resnet8", {"width": 8, "depths": (1,)}))
  with pytest.raises(ValueError, match=r"'resnet8'; layer .* is only in the artifact"):
    artifact.load(saved, *other, SPEC)
  wider = abstract(("resnet8", {"width": 8, "depths": (2, 1), "num_classes": 7}))
  with pytest.raises(ValueError, match=r"parameter fc/bias of \[10\]; in this model it is \[7\]"):
    artifact.load(saved, *wider, SPEC)
  with pytest.raises(ValueError, match="not empty"):
    artifact.save(saved, deployed, name="resnet8")
  layer = deployed.layers[name].replace(places=jnp.array([0, 4, 8, 999], jnp.int32))
  wrong = deployed.replace(layers=deployed.layers | {name: layer})
  artifact.save(tmp_path / "wrong", wrong, name="resnet8")
  with pytest.raises(ValueError, match=rf"{name} has boundaries \[0, 4, 8, 999\]; 4 in 0..8"):
    load(tmp_path / "wrong")


def test_refuses_links_that_the_model_does_not_have(deployed, tmp_path):
  name = "layer1/0/conv1"
  layer = deployed.layers[name].replace(feeds="layer1/1/conv1")
  wrong = deployed.replace(layers=deployed.layers | {name: layer})
  artifact.save(tmp_path / "wrong", wrong, name="resnet8")
  with pytest.raises(ValueError, match=rf"{name} feeds layer1/1/conv1, which .* again from its"):
    load(tmp_path / "wrong")


def test_refuses_devices(saved):
  device = types.SimpleNamespace(platform="METAL", device_kind="M2")
  with pytest.raises(ValueError, match=r"M2 .platform METAL. is not supported; use"):
    load(saved, device=device)


SCRIPT = """
import sys
import jax, numpy as np
from jax import export
run = export.deserialize(bytearray(open("model.bin", "rb").read())).call
weights = dict(np.load("weights.npz"))
x = np.load("x.npy")
np.save("y.npy", np.stack([run(weights, x, np.float32(r)) for r in (0.0, 0.4, 1.0)]))
assert not [name for name in sys.modules if "flexiq" in name]
"""


def test_export_runs_in_a_process_that_knows_jax_alone(deployed, small, tmp_path):
  x = small.x[:3]
  export.save(tmp_path, deployed, jax.ShapeDtypeStruct(x.shape, x.dtype))
  np.save(tmp_path / "x.npy", x)
  command = [sys.executable, "-I", "-c", SCRIPT]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  run = jax.jit(deployment.apply)
  for y, level in zip(np.load(tmp_path / "y.npy"), (0, 2, 3), strict=True):
    own = run(deployed, x, jnp.int32(level))
    np.testing.assert_allclose(y, own, atol=1e-4 * np.std(own))
  exported = export.export(deployed, jax.ShapeDtypeStruct(x.shape, x.dtype))
  assert exported.platforms == ("cpu", "cuda", "tpu")
  with pytest.raises(ValueError, match=r"platforms: .'rocm'.; of cpu, cuda, tpu"):
    export.export(deployed, SPEC, platforms=("cpu", "rocm"))


def test_kernels_are_exported_for_their_own_platform():
  small = made(VIT)
  spec = jax.ShapeDtypeStruct((4, *small.x.shape[1:]), jnp.float32)
  deployed = deployment.deploy(small.model, spec, granule=128)
  exported = export.export(deployed, spec, platforms=("tpu",), implementation="tpu")
  # The class token's rows are few: every layer of the block runs on the kernel.
  assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 4
  with pytest.raises(ValueError, match="'tpu' for platforms cpu, tpu; one is accepted"):
    export.export(deployed, spec, platforms=("cpu", "tpu"), implementation="tpu")
