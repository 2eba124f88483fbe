"""Models as pure functions: mode, batch sizes, paths, and the way back to a module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import models

# One of each class; tiny, because compiling dominates.
FAMILIES = ["resnet20", "resnet50", "mobilenet_v2", "efficientnet_lite0", "deit_s", "swin_t"]
PATHS = {
  "resnet20": ["conv1/kernel", "bn1/mean", "layer1/0/conv1/kernel", "layer2/0/bn2/var", "fc/bias"],
  "resnet50": ["layer1/0/downsample/0/kernel", "layer1/0/downsample/1/var", "layer2/0/bn3/scale"],
  "mobilenet_v2": ["features/0/0/kernel", "features/1/conv/1/kernel", "features/2/conv/1/1/mean"],
  "efficientnet_lite0": ["conv_stem/kernel", "blocks/0/0/conv_dw/kernel", "blocks/1/0/bn3/scale"],
  "deit_s": ["cls_token", "pos_embed", "patch_embed/proj/kernel", "blocks/1/mlp/fc1/kernel"],
  "swin_t": ["patch_embed/norm/scale", "layers/1/downsample/reduction/kernel", "head/kernel"],
}


@functools.lru_cache
def tiny(name):
  module = models.create(name, **models.MODELS[name].tiny)
  module.train()
  return (module, *models.functional(module))


@pytest.mark.parametrize("name", FAMILIES)
def test_paths_are_plain_strings_with_the_usual_names(name):
  _, _, params = tiny(name)

  def check(node):
    assert type(node) is dict
    for key, value in node.items():
      assert type(key) is str
      if not isinstance(value, jax.Array):
        check(value)

  check(params)
  assert set(PATHS[name]) <= set(models.flatten(params))


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_is_the_module_in_evaluation_mode(name):
  module, apply, params = tiny(name)
  rng = np.random.default_rng(0)
  # Statistics far from the batch's, so that the mode shows.
  params = jax.tree.map(lambda p: p + 0.1 * rng.random(p.shape, np.float32), params)
  x = rng.normal(size=(3, *module.input_shape)).astype(np.float32)
  copy = models.with_params(module, params)
  copy.eval()
  expected = np.asarray(nnx.jit(lambda module, x: module(x))(copy, x))
  logits = np.asarray(jax.jit(apply)(params, x))
  assert logits.dtype == np.float32 and logits.shape == (3, module.num_classes)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
  # Examples do not see each other, so any batch size gives the same.
  single = np.asarray(apply(params, x[1:2]))
  np.testing.assert_allclose(single[0], logits[1], rtol=1e-4, atol=1e-4 * np.abs(logits).max())
  assert np.abs(logits[0] - logits[1]).max() > 1e-3 * np.abs(logits).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kernel_is_contracted_exactly_once(name):
  module, apply, params = tiny(name)
  x = jnp.zeros((2, *module.input_shape))
  contractions, loops = _census(jax.make_jaxpr(apply)(params, x).jaxpr)
  paths = models.flatten(params)
  kernels = sum(path.endswith("/kernel") for path in paths)
  attention = 2 * sum(path.endswith("/qkv/kernel") for path in paths)
  assert len(contractions) == kernels + attention
  assert loops == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_reaches_every_contraction(name):
  tiny_low = {"dtype": "bfloat16", **models.MODELS[name].tiny}
  module = nnx.eval_shape(functools.partial(models.create, name, **tiny_low))
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((2, *module.input_shape), jnp.float32)
  contractions, _ = _census(jax.make_jaxpr(apply)(params, x).jaxpr)
  assert {dtype for pair in contractions for dtype in pair} == {jnp.dtype(jnp.bfloat16)}
  assert jax.eval_shape(apply, params, x).dtype == jnp.float32


def _census(jaxpr):
  """Operand dtypes of every contraction, and the number of loops and branches."""
  contractions, loops = [], 0
  for equation in jaxpr.eqns:
    kind = equation.primitive.name
    if kind in ("dot_general", "conv_general_dilated"):
      contractions.append([operand.aval.dtype for operand in equation.invars])
    loops += kind in ("scan", "while", "cond")
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        inner_contractions, inner_loops = _census(inner)
        contractions += inner_contractions
        loops += inner_loops
  return contractions, loops


def test_functional_leaves_the_module_alone():
  module = models.create("resnet8", width=4, depths=(1,))
  module.train()
  _, params = models.functional(module)
  module(jnp.ones((2, 8, 8, 1)))
  assert not module.bn1.use_running_average
  # The module's statistics moved on in training; the tree keeps what it was given.
  assert np.all(params["bn1"]["var"] == 1) and not np.all(module.bn1.var[...] == 1)


def test_training_mode_uses_and_updates_batch_statistics():
  module = models.create("resnet8", width=4, depths=(1,))
  module.train()
  x = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
  first = module.conv1(x)
  module(x)
  expected = 0.1 * np.asarray(first).mean((0, 1, 2))
  np.testing.assert_allclose(module.bn1.mean[...], expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_learned_parameter():
  _, apply, params = tiny("swin_t")
  module, _, _ = tiny("swin_t")
  x = jax.random.normal(jax.random.key(0), (2, *module.input_shape))
  gradients = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x) ** 2)))(params)
  for path, gradient in models.flatten(gradients).items():
    assert np.abs(gradient).max() > 0, path


def test_with_params_keeps_mode_and_refuses_other_trees():
  module = models.create("resnet8", width=4, depths=(1,))
  module.eval()
  _, params = models.functional(module)
  changed = jax.tree.map(lambda p: p + 1, params)
  copy = models.with_params(module, changed)
  assert copy.bn1.use_running_average
  np.testing.assert_array_equal(copy.fc.kernel[...], changed["fc"]["kernel"])
  np.testing.assert_array_equal(module.fc.kernel[...], params["fc"]["kernel"])

  flat = models.flatten(params)
  flat["fc/weight"] = flat.pop("fc/kernel")
  flat["fc/bias"] = jnp.zeros(3)
  with pytest.raises(
    ValueError,
    match=r"params do not fit this ResNet: 3 differences: fc/kernel is missing; fc/weight is "
    r"unknown; fc/bias has shape \[3\], not \[10\]",
  ):
    models.with_params(module, models.unflatten(flat))


def test_shapes_alone_are_enough_for_a_tree():
  module = nnx.eval_shape(functools.partial(models.create, "resnet20"))
  _, params = models.functional(module)
  assert params["layer3"]["2"]["conv2"]["kernel"].shape == (3, 3, 64, 64)


def test_flatten_and_unflatten_are_inverse():
  tree = {"a": {"0": {"kernel": 1}, "b": 2}, "c": 3}
  assert models.flatten(tree) == {"a/0/kernel": 1, "a/b": 2, "c": 3}
  assert models.unflatten(models.flatten(tree)) == tree
