"""Activation functions by their jaxpr, and which layer feeds which, on the project's own models."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flexiq_jax import deployment, models
from flexiq_jax.deployment import activations, links
from flexiq_jax.graph import tracing


def traced_model(name):
  module = nnx.eval_shape(lambda: models.create(name, **models.MODELS[name].tiny))
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  folded, shapes = deployment.fold_shapes(apply, params, x)
  return tracing.trace(folded, shapes, x)


def traced_function(f):
  params = {n: jax.ShapeDtypeStruct((6, 6), jnp.float32) for n in ("a", "b")}
  params["bias"] = jax.ShapeDtypeStruct((1, 6), jnp.float32)
  return tracing.trace(f, params, jax.ShapeDtypeStruct((2, 6), jnp.float32))


def activation_of(f):
  """What the links pass makes of `f` between two layers."""
  traced = traced_function(lambda p, x: f(x @ p["a"] + p["bias"]) @ p["b"])
  tail = links.tails(traced)["a"]
  feed = links.feeds(traced, links.tails(traced), {"a", "b"})["b"]
  assert tail.bias is not None
  assert (feed.producer == "a") == (feed.reason == "")
  return tail.activation, feed.producer == "a"


@pytest.mark.parametrize("name", activations.FORMS)
def test_each_form_is_found(name):
  for form in activations.FORMS[name]:
    assert activation_of(form) == (name, True)
    assert activation_of(jax.jit(form)) == (name, True)
  assert activation_of(lambda x: x) == ("none", True)


@pytest.mark.parametrize(
  "f",
  [
    jnp.tanh,
    jax.nn.silu,
    lambda x: jnp.maximum(x, 0.1),
    lambda x: jnp.clip(x, 0.0, 5.0),
    lambda x: jnp.clip(x, -6.0, 6.0),
    lambda x: jax.nn.leaky_relu(x, 0.01),
    lambda x: x * jax.scipy.stats.norm.cdf(1.01 * x),
    lambda x: jnp.maximum(x, jnp.float32(0)) * 2,
  ],
)
def test_others_are_not(f):
  name, linked = activation_of(f)
  assert not linked
  assert name in ("none", "relu")  # at most the part of it that is one


def test_longest_match_wins_and_shared_values_do_not():
  assert activation_of(lambda x: jnp.minimum(jnp.maximum(x, 0), 6)) == ("relu6", True)
  # The inner value is read again: neither function can go into the epilogue.
  assert activation_of(lambda x: jax.nn.relu(x) + x) == ("none", False)
  seen = jax.nn.relu
  assert activation_of(lambda x: seen(x) + jnp.tanh(seen(x))) == ("none", False)


def test_bias_must_be_one_value_per_output():
  full = traced_function(lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][:2] @ jnp.eye(6)))
  assert links.tails(full)["a"].bias is None
  assert links.tails(full)["a"].activation == "none"


def feeds(name):
  traced = traced_model(name)
  producers = {layer.name for layer in traced.layers.values() if layer.kind != "depthwise"}
  return links.feeds(traced, links.tails(traced), producers)


def test_transformer_mlps_are_linked():
  for name, blocks in (("vit_cifar10", "blocks/0"), ("swin_t", "layers/0/blocks/1")):
    found = feeds(name)
    assert found[f"{blocks}/mlp/fc2"].producer == f"{blocks}/mlp/fc1"
    assert [n for n, f in found.items() if f.producer and not n.endswith("fc2")] == []
    assert "attention" in found[f"{blocks}/attn/proj"].reason


def test_inner_convolutions_are_linked():
  found = feeds("resnet50")
  assert found["layer1/0/conv2"].producer == "layer1/0/conv1"
  assert found["layer1/0/conv3"].producer == "layer1/0/conv2"
  assert found["layer2/0/conv1"].producer is None
  assert feeds("resnet20")["layer1/0/conv2"].producer == "layer1/0/conv1"
  assert feeds("resnet20")["layer1/0/conv1"].reason == "the result of conv1 is read elsewhere, too"


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_linear_bottlenecks_are_linked_where_no_residual_reads_them(name):
  linked = {n: f.producer for n, f in feeds(name).items() if f.producer}
  reasons = [f.reason for f in feeds(name).values()]
  assert any("depthwise" in reason for reason in reasons)
  assert any("read elsewhere" in reason for reason in reasons)
  assert len(linked) >= 3


def test_reasons_are_told():
  found = feeds("vit_cifar10")
  assert found["patch_embed/proj"].reason == "its input is the model's input"
  assert "normalisation" in found["blocks/0/attn/qkv"].reason
  assert all((f.producer is None) == bool(f.reason) for f in found.values())


def test_reshape_of_other_dimensions_passes_and_a_transpose_does_not():
  def model(p, x, change):
    y = jax.nn.relu(jnp.stack([x, x], 1) @ p["a"])
    return change(y) @ p["b"]

  for change, linked in (
    (lambda y: y.reshape(-1, 6), True),
    (lambda y: y.reshape(-1, 1, 6), True),
    (lambda y: y.transpose(1, 0, 2), False),
    (lambda y: y.reshape(-1, 2, 3, 2).reshape(-1, 6), False),
  ):
    traced = traced_function(lambda p, x, c=change: model({**p}, x, c))
    found = links.feeds(traced, links.tails(traced), {"a", "b"})
    assert (found["b"].producer == "a") == linked


def test_rounded_results_and_other_producers_are_refused():
  def half(p, x):
    return jax.nn.relu((x @ p["a"]).astype(jnp.bfloat16)).astype(jnp.float32) @ p["b"]

  traced = traced_function(half)
  assert links.feeds(traced, links.tails(traced), {"a", "b"})["b"].producer is None
  traced = traced_function(lambda p, x: x @ p["a"] @ p["b"])
  reason = links.feeds(traced, links.tails(traced), {"b"})["b"].reason
  assert reason == "a, which feeds it, has no kernel with an epilogue"
