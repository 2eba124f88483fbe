"""Operations and nodes of models of several kinds, against lists written by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flexiq_jax import models
from flexiq_jax.graph import tracing
from flexiq_jax.methods import fusion

BLOCK = ["layer", "norm", "add", "activation"]


def operations(apply, params, x):
  return fusion.operations(tracing.trace(apply, params, x))


def of_model(name):
  module = nnx.eval_shape(lambda: models.create(name, seed=0, **models.get(name).tiny))
  apply, params = models.functional(module)
  return operations(apply, params, jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32))


def kinds(found, node):
  return [found[i].kind for i in node.operations]


@pytest.fixture(scope="module")
def resnet():
  return of_model("resnet8")


def test_residual_network(resnet):
  nodes = fusion.nodes(resnet, "residual")
  plain, block = ["layer", "norm", "activation"], BLOCK
  assert [kinds(resnet, n) for n in nodes] == [plain, *[plain, block] * 3, ["layer", "norm"]]
  # A block reads its own first convolution and, past padding, the block before.
  assert [n.inputs for n in nodes] == [(), (0,), (1, 0), (2,), (3, 2), (4,), (5, 4), (6,)]
  assert [n.name for n in nodes[:2]] == ["conv1", "layer1/0/conv1"]


def test_less_fusion_leaves_more_nodes(resnet):
  counts = {g: len(fusion.nodes(resnet, g)) for g in fusion.GROUPINGS}
  assert counts == {"unfused": 26, "norm": 18, "activation": 14, "residual": 8}
  last = fusion.nodes(resnet, "activation")[-3:]
  assert [n.name for n in last] == [
    "layer3/0/conv2+add",
    "layer3/0/conv2+add+activation",
    "fc",
  ]


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "efficientnet_lite0", "vit_s", "swin_t"])
def test_every_operation_is_in_one_node(name):
  found = of_model(name)
  coarser = None
  for grouping in reversed(fusion.GROUPINGS):
    nodes = fusion.nodes(found, grouping)
    assert sorted(i for n in nodes for i in n.operations) == list(range(len(found)))
    assert len({n.name for n in nodes}) == len(nodes)
    assert all(p < v for v, n in enumerate(nodes) for p in n.inputs)
    owner = {i: v for v, n in enumerate(nodes) for i in n.operations}
    if coarser:
      assert all(len({coarser[i] for i in n.operations}) == 1 for n in nodes)
    coarser = owner


def test_transformer():
  found = of_model("vit_s")
  nodes = {n.name: n for n in fusion.nodes(found, "residual")}
  names = [*nodes]
  assert kinds(found, nodes["blocks/0/mlp/fc1"]) == ["layer", "norm", "activation"]
  assert kinds(found, nodes["blocks/0/mlp/fc2"]) == ["layer", "norm", "add"]
  # Attention is no operation: its projection reads the layer before it, and the stream.
  inputs = [names[p] for p in nodes["blocks/0/attn/proj"].inputs]
  assert inputs == ["blocks/0/attn/qkv", "patch_embed/proj"]


@pytest.mark.parametrize(
  "function",
  [
    jax.nn.relu,
    jax.nn.relu6,
    jax.nn.silu,
    jax.nn.gelu,
    lambda y: jax.nn.gelu(y, approximate=False),
    jnp.tanh,
    jax.nn.leaky_relu,
  ],
)
def test_activations(function):
  params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  found = operations(lambda p, x: function(x @ p["a"]) @ p["b"], params, jnp.ones((2, 3)))
  assert [o.kind for o in found] == ["layer", "activation", "layer"]
  assert [kinds(found, n) for n in fusion.nodes(found, "activation")] == [
    ["layer", "activation"],
    ["layer"],
  ]


def test_what_others_read_is_not_fused():
  params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}

  def apply(p, x):
    y = x @ p["a"]
    return jax.nn.relu(y) @ p["b"] + y

  found = operations(apply, params, jnp.ones((2, 3)))
  nodes = fusion.nodes(found, "residual")
  assert [n.name for n in nodes] == ["a", "a+activation", "b"]
  assert kinds(found, nodes[2]) == ["layer", "add"]
  assert nodes[2].inputs == (1, 0)


def test_a_result_of_the_model_is_not_fused():
  params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}

  def apply(p, x):
    y = x @ p["a"]
    return jax.nn.relu(y) @ p["b"], y

  found = operations(apply, params, jnp.ones((2, 3)))
  assert [n.name for n in fusion.nodes(found, "residual")] == ["a", "a+activation", "b"]


def test_pooling_stands_between():
  params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}

  def apply(p, x):
    y = jax.nn.relu(x @ p["a"]).max(axis=1)
    return jax.nn.relu(y @ p["b"]) + y

  found = operations(apply, params, jnp.ones((2, 5, 3)))
  nodes = fusion.nodes(found, "residual")
  assert [kinds(found, n) for n in nodes] == [
    ["layer", "activation"],
    ["layer", "activation", "add"],
  ]


def test_unknown_grouping(resnet):
  with pytest.raises(ValueError, match=r"grouping: 'all' is not one of unfused, norm"):
    fusion.nodes(resnet, "all")
