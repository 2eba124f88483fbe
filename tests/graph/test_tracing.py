"""Finding layers in models of every dialect, and running them by a rule."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import graph, models
from flexiq_jax.quant.rules import float_rule
from tests.graph import models_for_test

SPEC = jax.ShapeDtypeStruct


def facts(layer):
  return (layer.name, layer.kind, layer.in_channels, layer.out_channels, layer.groups, layer.macs)


FACTS = {  # name, kind, C, N, groups, MACs of one 8 x 8 image
  "nnx": [
    ("conv1", "conv", 3, 8, 1, 16 * 9 * 3 * 8),
    ("depthwise", "depthwise", 8, 8, 8, 16 * 9 * 8),
    ("grouped", "conv", 8, 12, 2, 16 * 4 * 12),
    ("attn/query", "dense", 12, 12, 1, 16 * 144),
    ("attn/key", "dense", 12, 12, 1, 16 * 144),
    ("attn/value", "dense", 12, 12, 1, 16 * 144),
    ("attn/out", "dense", 12, 12, 1, 16 * 144),
    ("head", "dense", 12, 5, 1, 60),
  ],
  "linen": [
    ("conv1", "conv", 3, 8, 1, 16 * 9 * 3 * 8),
    ("depthwise", "depthwise", 8, 8, 8, 16 * 9 * 8),
    ("split", "dense", 8, 12, 1, 16 * 96),
    ("merge", "dense", 12, 6, 1, 16 * 72),
    ("head", "dense", 6, 5, 1, 30),
  ],
  "plain": [
    ("stem", "conv", 3, 8, 1, 64 * 9 * 3 * 8),
    ("heads", "dense", 8, 6, 2, 24),
    ("out", "dense", 6, 5, 1, 30),
  ],
}


@functools.cache
def made(name):
  return models_for_test.MODELS[name]()


@pytest.mark.parametrize("name", FACTS)
def test_layers_of_every_dialect(name):
  apply, params = made(name)
  layers = graph.layers(apply, params, models_for_test.image(batch=3))
  assert sorted(map(facts, layers)) == sorted(FACTS[name])
  assert graph.skipped(apply, params, models_for_test.image()) == ()
  # Neither the batch size, nor jit, nor abstract values make a difference.
  abstract = jax.tree.map(lambda a: SPEC(a.shape, a.dtype), params)
  assert graph.layers(jax.jit(apply), abstract, SPEC((7, 8, 8, 3), jnp.float32)) == layers


def test_execution_order():
  for name in ("linen", "plain"):
    apply, params = made(name)
    layers = graph.layers(apply, params, models_for_test.image())
    assert list(map(facts, layers)) == FACTS[name]


def test_weights_are_the_operands():
  x = models_for_test.image()
  apply, params = made("plain")
  found = graph.weights(apply, params, x)
  assert list(found) == ["stem", "heads", "out"]
  for name, w in found.items():
    np.testing.assert_array_equal(w, params["out"]["w"] if name == "out" else params[name])
  apply, params = made("linen")
  found = graph.weights(apply, params, x)
  for layer in graph.layers(apply, params, x):
    kernel = params["params"][layer.name]["kernel"]
    assert found[layer.name].shape == layer.w_shape  # DenseGeneral flattens (3, 4) to 12
    np.testing.assert_array_equal(found[layer.name].ravel(), kernel.ravel())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float_rule_is_the_model(dtype):
  apply, params = models_for_test.nnx_model(dtype)
  x = models_for_test.image(dtype=dtype)
  run = graph.with_rule(apply, float_rule)
  want = jax.jit(apply)(params, x)
  got = jax.jit(run)(params, x)
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["linen", "plain"])
def test_float_rule_is_the_model_in_every_transformation(name):
  apply, params = made(name)
  x = models_for_test.image()
  run = graph.with_rule(apply, float_rule)
  want = jax.jit(apply)(params, x)
  np.testing.assert_array_equal(jax.jit(run)(params, x), want)
  loss = lambda f: lambda p, x: jnp.square(f(p, x)).sum()
  gradients = [jax.jit(jax.grad(loss(f), argnums=(0, 1)))(params, x) for f in (run, apply)]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, *gradients)
  mapped = jax.jit(jax.vmap(lambda x: run(params, x[None])[0]))(x)
  np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-6)


def test_rule_sees_operands_and_replaces_the_result():
  apply, params = made("plain")
  x = models_for_test.image()
  seen = {}

  def rule(layer, x, w, contract):
    seen[layer.name] = (x.shape, w.shape)
    y = contract(x, w)
    return jnp.zeros_like(y) if layer.name == "out" else y

  out = graph.with_rule(apply, rule)(params, x)
  np.testing.assert_array_equal(out, np.ones((2, 5)))  # the bias, which is no layer's
  assert seen == {
    "stem": ((2, 8, 8, 3), (3, 3, 3, 8)),
    "heads": ((2, 2, 4), (2, 4, 3)),
    "out": ((2, 6), (5, 6)),
  }


def test_contract_takes_integers():
  apply = lambda p, x: jnp.einsum("of,bf->bo", p["w"], x)
  rng = np.random.default_rng(0)
  x, w = rng.integers(-127, 128, (3, 50)), rng.integers(-127, 128, (4, 50))

  def rule(layer, x, w, contract):
    y = contract(x.astype(jnp.int8), w.astype(jnp.int8), jnp.int32)
    assert y.dtype == jnp.int32
    return y

  out = graph.with_rule(apply, rule)({"w": w.astype(np.float32)}, x.astype(np.float32))
  assert out.dtype == jnp.float32  # cast to what the model expects
  np.testing.assert_array_equal(out, x @ w.T)


def test_result_of_another_shape_is_refused():
  apply, params = made("plain")
  run = graph.with_rule(apply, lambda layer, x, w, contract: contract(x, w)[:1])
  with pytest.raises(ValueError, match=r"rule: result of layer stem has shape \(1, 8, 8, 8\), not"):
    run(params, models_for_test.image())


def test_wrapped_parameters_are_followed():
  """Casts, transposes, reshapes, slices, arithmetic on parameters: still that parameter."""

  def apply(p, x):
    w = (p["v"] * (p["g"] / jnp.sqrt(jnp.square(p["v"]).sum(axis=0, keepdims=True)))).T
    x = x @ w.astype(jnp.bfloat16).astype(jnp.float32).reshape(6, 2, 2).reshape(6, 4)
    return x @ p["stack"][1]

  params = {
    "v": SPEC((4, 6), jnp.float32),
    "g": SPEC((1, 6), jnp.float32),
    "stack": SPEC((2, 4, 3), jnp.float32),
  }
  layers = graph.layers(apply, params, SPEC((5, 6), jnp.float32))
  assert [(layer.name, layer.in_channels, layer.out_channels) for layer in layers] == [
    ("v", 6, 4),
    ("stack", 4, 3),
  ]


@jax.custom_jvp
def cube(x):
  return x**3


cube.defjvp(lambda p, t: (cube(p[0]), 7.0 * t[0]))  # not its derivative, so that it can be told


@jax.custom_vjp
def flip(x):
  return x


flip.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def test_derivative_rules_survive():
  apply = lambda p, x: flip(cube(x @ p["a"])) @ p["b"]
  rng = np.random.default_rng(0)
  params = {"a": rng.normal(size=(3, 3)).astype("f"), "b": rng.normal(size=(3, 2)).astype("f")}
  x = rng.normal(size=(2, 3)).astype("f")
  got = jax.grad(lambda p: graph.with_rule(apply, float_rule)(p, x).sum())(params)
  np.testing.assert_allclose(got["a"], -7 * x.T @ (np.ones((2, 2)) @ params["b"].T), rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, got, jax.grad(lambda p: apply(p, x).sum())(params))


def test_layers_inside_of_calls():
  """Rematerialisation, derivative rules and nested jits that hold a layer are opened."""
  silent = jax.custom_jvp(lambda w, x: x @ w)
  silent.defjvp(lambda p, t: (silent(*p), p[1] @ t[0] + t[1] @ p[0]))

  def apply(p, x):
    x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["a"], x)
    x = jax.jit(jax.jit(lambda w, x: x @ w))(p["b"], x)
    return silent(p["c"], x)

  w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3)), jnp.float32)
  params, x = {"a": w[0], "b": w[1], "c": w[2]}, jnp.ones((2, 3))
  assert [layer.name for layer in graph.layers(apply, params, x)] == ["a", "b", "c"]
  run = graph.with_rule(apply, float_rule)
  np.testing.assert_array_equal(run(params, x), apply(params, x))
  got = jax.grad(lambda p: run(p, x).sum())(params)
  want = jax.grad(lambda p: apply(p, x).sum())(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def test_names_are_the_modules_or_the_parameters_where_a_module_has_several():
  params = {"a": {"w": jnp.ones((3, 3))}, "b": {"in": jnp.ones((3, 3)), "out": jnp.ones((3, 3))}}
  apply = lambda p, x: x @ p["a"]["w"] @ p["b"]["in"] @ p["b"]["out"]
  layers = graph.layers(apply, params, jnp.ones((2, 3)))
  assert [layer.name for layer in layers] == ["a", "b/in", "b/out"]
  assert [layer.param for layer in layers] == ["a/w", "b/in", "b/out"]
  assert graph.closest("b/int", ["a", "b/in", "b/out"], n=2) == "b/in, b/out"


def test_several_inputs():
  apply = lambda p, x: x["left"] @ p["a"] + x["right"] @ p["b"]
  x = {"left": jnp.ones((4, 3)), "right": jnp.ones((4, 2))}
  params = {"a": jnp.ones((3, 5)), "b": jnp.ones((2, 5))}
  assert [layer.macs for layer in graph.layers(apply, params, x)] == [15, 10]
  np.testing.assert_array_equal(graph.with_rule(apply, float_rule)(params, x), apply(params, x))


def test_linen_and_nnx_give_one_and_the_same_layer():
  linen, x = nn.Dense(4), jnp.ones((2, 3))
  graphdef, state = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
  one = graph.layers(lambda p, x: nnx.merge(graphdef, p)(x), state, x)
  other = graph.layers(linen.apply, linen.init(jax.random.key(0), x), x)
  assert facts(one[0])[1:] == facts(other[0])[1:]
  assert (one[0].name, other[0].name) == ("kernel", "kernel")


FAMILIES = (
  "resnet8",
  "resnet18",
  "resnet50",
  "mobilenet_v2",
  "efficientnet_lite0",
  "squeezenet1_0",
  "vgg16",
  "vit_s",
  "swin_t",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_of_a_model_family_is_a_layer(name):
  module = nnx.eval_shape(lambda: models.create(name, **models.MODELS[name].tiny))
  apply, params = models.functional(module)
  x = SPEC((2, *module.input_shape), jnp.float32)
  layers = graph.layers(apply, params, x)
  kernels = {
    path: leaf for path, leaf in models.flatten(params).items() if path.endswith("/kernel")
  }
  assert {layer.param: layer.w_shape for layer in layers} == {
    p: k.shape for p, k in kernels.items()
  }
  assert graph.skipped(apply, params, x) == ()
  assert all(layer.x_rows for layer in layers)  # dynamic shifts can be chosen per example
  assert [layer.name + "/kernel" for layer in layers] == [layer.param for layer in layers]


@pytest.mark.parametrize(
  ("name", "count", "giga_macs"),
  [
    ("resnet50", 54, 4.089),
    ("squeezenet1_0", 26, 0.819),
    ("squeezenet1_1", 26, 0.349),
    ("vgg16", 16, 15.470),
  ],
)
def test_full_models_have_their_published_macs(name, count, giga_macs):
  """At 224 x 224; torchvision's GFLOPS, which are multiply-accumulates."""
  module = nnx.eval_shape(lambda: models.create(name))
  apply, params = models.functional(module)
  layers = graph.layers(apply, params, SPEC((1, 224, 224, 3), jnp.float32))
  assert len(layers) == count
  assert sum(layer.macs for layer in layers) == pytest.approx(giga_macs * 1e9, rel=3e-3)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bool_])
def test_inputs_that_are_integers_are_layers_with_real_weights(dtype):
  apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
  params = {"a": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.ones((3, 2))}
  x = jnp.asarray([[0, 200, 0, 3], [1, 0, 9, 0]], dtype)
  assert graph.layers(apply, params, x) == graph.layers(apply, params, x.astype(jnp.float32))
  assert not graph.skipped(apply, params, x)
  folded = graph.fold_batch_norm(apply, params, x.astype(jnp.float32))
  for run, p in ((apply, params), folded):
    result = graph.with_rule(run, float_rule)(p, x)
    np.testing.assert_allclose(result, apply(params, x), rtol=1e-6)
