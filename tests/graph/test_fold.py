"""Batch norm folding: the same logits, the same layers, and nothing folded that must stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph, models
from tests.graph import models_for_test

FAMILIES = ("resnet18", "mobilenet_v2", "efficientnet_lite0", "vgg16_bn", "vit_s", "swin_t")


@functools.cache
def family(name):
  module = models.create(name, **models.MODELS[name].tiny)
  apply, params = models.functional(module)
  return apply, models_for_test.randomize(params), module.input_shape


def relative(a, b):
  return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_families_give_the_same_logits(name):
  apply, params, shape = family(name)
  x = jax.random.normal(jax.random.key(0), (2, *shape))
  folded_apply, folded = graph.fold_batch_norm(apply, params, x[:1])
  assert relative(jax.jit(folded_apply)(folded, x), jax.jit(apply)(params, x)) < 1e-5
  abstract = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
  assert graph.layers(folded_apply, folded, abstract) == graph.layers(apply, params, abstract)
  paths = models.flatten(folded)
  assert not [p for p in paths if p.split("/")[-1] in ("mean", "var")]  # all statistics are gone
  norms = [p for p in models.flatten(params) if p.endswith("/scale")]
  layer_norms = [p for p in norms if p.replace("/scale", "/mean") not in models.flatten(params)]
  assert {p for p in paths if p.endswith("/scale")} == set(layer_norms)  # they depend on the input
  if name in ("vit_s", "swin_t"):
    assert layer_norms
    kept = "pos_embed" if name == "vit_s" else "layers/0/blocks/0/attn/relative_position_bias_table"
    np.testing.assert_array_equal(paths[kept], models.flatten(params)[kept])


@pytest.mark.parametrize("name", models_for_test.MODELS)
def test_folded_dialects_give_the_same_logits(name):
  apply, params = models_for_test.MODELS[name]()
  x = models_for_test.image()
  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  assert relative(jax.jit(folded_apply)(folded, x), jax.jit(apply)(params, x)) < 1e-5
  assert graph.layers(folded_apply, folded, x) == graph.layers(apply, params, x)


def test_folding_once_more_changes_nothing():
  apply, params = models_for_test.plain_model()
  x = models_for_test.image()
  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  again_apply, again = graph.fold_batch_norm(folded_apply, folded, x)
  assert relative(jax.jit(again_apply)(again, x), jax.jit(apply)(params, x)) < 1e-5
  assert set(models.flatten(again)) == set(models.flatten(folded))


def test_kernel_and_bias_are_the_textbook_ones():
  rng = np.random.default_rng(0)
  p = {
    "fc": {"kernel": rng.normal(size=(4, 3))},
    "bn": {k: rng.uniform(0.5, 2, 3) for k in ("scale", "bias", "mean", "var")},
  }
  p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)

  def apply(p, x):
    y = x @ p["fc"]["kernel"]
    bn = jax.tree.map(lambda v: v[None], p["bn"])
    return (y - bn["mean"]) * jax.lax.rsqrt(bn["var"] + 1e-3) * bn["scale"] + bn["bias"]

  _, folded = graph.fold_batch_norm(apply, p, jnp.ones((1, 4)))
  a = p["bn"]["scale"] / np.sqrt(p["bn"]["var"] + 1e-3)
  assert set(models.flatten(folded)) == {"fc/kernel", "fc/bias"}
  np.testing.assert_allclose(folded["fc"]["kernel"], p["fc"]["kernel"] * a[None], rtol=1e-5)
  np.testing.assert_allclose(
    folded["fc"]["bias"], p["bn"]["bias"] - p["bn"]["mean"] * a, rtol=1e-4, atol=1e-6
  )


V = jax.ShapeDtypeStruct((3,), jnp.float32)
AFFINE = {
  "minuend": lambda y, v: v[None] - y,
  "divisor": lambda y, v: y / v[None],
  "scalars": lambda y, v: (2.0 * y - 1.5) / 4.0 + v[None],
  "layer scale": lambda y, v: y * v[None] * v[None],
  "cast between": lambda y, v: (y.astype(jnp.bfloat16).astype(jnp.float32)) + v[None],
}
LEFT_ALONE = {
  "inverse": lambda y, v: v[None] / y,
  "after a nonlinearity": lambda y, v: jax.nn.relu(y) * v[None],
  "square": lambda y, v: y * y + v[None],
  "used twice": lambda y, v: y * v[None] + jnp.tanh(y),
  "residual": lambda y, v: y + jax.lax.slice(y, (0, 0), y.shape) * v[None],
  "varies over positions": lambda y, v: y.reshape(-1, 3, 1) + v.reshape(1, 3, 1),
}


def one_layer(after):
  rng = np.random.default_rng(1)
  params = {
    "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    "v": jnp.asarray(rng.uniform(0.5, 2, 3), jnp.float32),
  }
  x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
  return (lambda p, x: after(x @ p["w"], p["v"])), params, x


@pytest.mark.parametrize("after", AFFINE.values(), ids=AFFINE)
def test_every_affine_form_is_folded(after):
  apply, params, x = one_layer(after)
  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  assert "v" not in folded
  assert set(folded) == {"w", "w_bias"}
  tolerance = 2e-2 if after is AFFINE["cast between"] else 1e-6
  np.testing.assert_allclose(
    folded_apply(folded, x), apply(params, x), rtol=tolerance, atol=tolerance
  )


@pytest.mark.parametrize("after", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_nothing_else_is_folded(after):
  apply, params, x = one_layer(after)
  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  assert set(folded) == {"w", "v"}
  jax.tree.map(np.testing.assert_array_equal, folded, params)
  np.testing.assert_allclose(folded_apply(folded, x), apply(params, x), rtol=1e-6)


def test_position_embeddings_and_residuals_stay():
  rng = np.random.default_rng(0)
  params = {
    "proj": {"kernel": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)},
    "pos_embed": rng.normal(size=(1, 5, 4)),
  }
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)

  def apply(p, x):
    y = x @ p["proj"]["kernel"] + p["proj"]["bias"][None, None]
    return x + (y + p["pos_embed"])

  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  jax.tree.map(np.testing.assert_array_equal, folded, params)
  np.testing.assert_allclose(folded_apply(folded, x), apply(params, x), rtol=1e-6)


def test_grouped_convolution_scales_the_right_outputs():
  numbers = ("NHWC", "HWIO", "NHWC")
  rng = np.random.default_rng(0)
  p = {
    "w": jnp.asarray(rng.normal(size=(3, 3, 2, 6)), jnp.float32),
    "scale": jnp.asarray(rng.uniform(0.5, 2, 6), jnp.float32),
  }
  conv = lambda p, x: (
    jax.lax.conv_general_dilated(
      x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3
    )
    * p["scale"].reshape(1, 1, 1, 6)
  )
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 6)), jnp.float32)
  folded_apply, folded = graph.fold_batch_norm(conv, p, x)
  np.testing.assert_allclose(folded["w"], p["w"] * p["scale"].reshape(1, 1, 1, 6), rtol=1e-6)
  assert relative(folded_apply(folded, x), conv(p, x)) < 1e-5


def test_bfloat16_models_fold_in_float32():
  apply, params = models_for_test.nnx_model(jnp.bfloat16)
  x = models_for_test.image()
  folded_apply, folded = graph.fold_batch_norm(apply, params, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.float32)}
  want = jax.jit(apply)(params, x)
  got = jax.jit(folded_apply)(folded, x)
  assert got.dtype == want.dtype == jnp.bfloat16
  assert relative(got.astype(jnp.float32), want.astype(jnp.float32)) < 5e-2
