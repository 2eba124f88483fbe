"""Layers whose weights are parts of one parameter, or the same: names, and what they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph, models
from flexiq_jax.quant.rules import float_rule

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def chain(*weights):
  """Applies some weights `[4, n]` beside each other; the results are summed."""
  return lambda p, x: sum(jnp.tanh(x @ w(p)).sum(axis=-1) for w in weights)


STACK = {
  "blocks": {"a": {"kernel": draw(3, 4, 4), "b": draw(3, 4)}, "c": {"kernel": draw(3, 4, 4)}}
}
PARTS = {  # parameters, weights of the layers in turn, their names, and paths of their weights
  "indices": (
    {"w": draw(3, 4, 4)},
    (lambda p: p["w"][0], lambda p: p["w"][-1]),
    {"w/0": "w/0", "w/2": "w/2"},
  ),
  "one index": ({"fc": {"w": draw(3, 4, 4)}}, (lambda p: p["fc"]["w"][1],), {"fc": "fc/w"}),
  "a stack": (
    STACK,
    (lambda p: p["blocks"]["a"]["kernel"][1], lambda p: p["blocks"]["a"]["kernel"][2]),
    {"blocks/1/a": "blocks/1/a/kernel", "blocks/2/a": "blocks/2/a/kernel"},
  ),
  "beside what is no stack": (
    {"net": {**STACK, "out": {"kernel": draw(4, 4)}}},
    (
      lambda p: p["net"]["blocks"]["c"]["kernel"][0] + p["net"]["blocks"]["a"]["b"][0][:, None],
      lambda p: p["net"]["blocks"]["c"]["kernel"][1].T,
      lambda p: p["net"]["out"]["kernel"],
    ),
    {
      "net/blocks/0/c": "net/blocks/0/c/kernel",
      "net/blocks/1/c": "net/blocks/1/c/kernel",
      "net/out": "net/out/kernel",
    },
  ),
  "Linen": (
    {"params": {"a": {"kernel": draw(2, 4, 4)}}},
    (lambda p: p["params"]["a"]["kernel"][0], lambda p: p["params"]["a"]["kernel"][1]),
    {"a/0": "params/a/0/kernel", "a/1": "params/a/1/kernel"},
  ),
  "two indices": (
    {"w": draw(2, 4, 3, 4)},
    (lambda p: p["w"][1, :, 0], lambda p: jnp.moveaxis(p["w"], 2, 0)[2][1]),
    {"w/1/0": "w/1/0", "w/1/2": "w/1/2"},
  ),
  "a reshaped stack": (
    {"w": draw(6, 4, 4)},
    (lambda p: p["w"].reshape(2, 3, 4, 4)[1, 2], lambda p: p["w"].reshape(3, 2, 4, 4)[0, 1]),
    {"w/5": "w/5", "w/1": "w/1"},
  ),
  "ranges": (
    {"attn": {"qkv": draw(4, 12)}},
    tuple(lambda p, i=i: jnp.split(p["attn"]["qkv"], 3, axis=1)[i] for i in (0, 2)),
    {"attn/0:4": "attn/0:4/qkv", "attn/8:12": "attn/8:12/qkv"},
  ),
  "every third": (
    {"w": draw(12, 4)},
    (lambda p: p["w"][::3], lambda p: p["w"].reshape(4, 3, 4)[:, 1]),
    {"w/0:10:3": "w/0:10:3", "w/1:11:3": "w/1:11:3"},
  ),
  "in another way": (
    {"w": draw(8, 4)},
    (lambda p: p["w"][np.array([0, 2, 4, 6])], lambda p: (2 * p["w"])[:4], lambda p: p["w"][4:]),
    {"w/0": "w/0", "w/1": "w/1", "w/4:8": "w/4:8"},
  ),
  "hidden by a reshape": (
    {"w": draw(4, 2, 4)},
    tuple(lambda p, i=i: p["w"].reshape(8, 4)[4 * i : 4 * i + 4] for i in (0, 1)),
    {"w/0": "w/0", "w/1": "w/1"},
  ),
}


@pytest.mark.parametrize(("params", "weights", "names"), PARTS.values(), ids=PARTS)
def test_parts_of_a_parameter_are_layers_of_their_own(params, weights, names):
  apply = chain(*weights)
  found = graph.layers(apply, params, X)
  assert {layer.name: layer.param for layer in found} == names
  assert graph.shared(apply, params, X) == {}
  for w, name in zip(weights, names, strict=True):
    np.testing.assert_array_equal(graph.weights(apply, params, X)[name], w(params))
  check_fold(apply, params)


def check_fold(apply, params):
  """The folded model has the same layers and, but for rounding, results."""
  folded_apply, folded = graph.fold_batch_norm(apply, params, X)
  assert graph.layers(folded_apply, folded, X) == graph.layers(apply, params, X)
  want = apply(params, X)
  np.testing.assert_allclose(folded_apply(folded, X), want, rtol=1e-5, atol=1e-5)
  run = graph.with_rule(folded_apply, float_rule)
  np.testing.assert_allclose(run(folded, X), want, rtol=1e-5, atol=1e-5)
  return folded


SHARED = {  # parameters, model, what layers share, and paths of the folded model's parameters
  "transposed": (
    {"w": draw(4, 4)},
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
    {"w": "w:2", "w:2": "w"},
    {"w", "w:2"},
  ),
  "three times in a module": (
    {"fc": {"kernel": draw(4, 4), "bias": draw(4)}, "head": draw(4, 3)},
    lambda p, x: (
      jax.lax.fori_loop(
        0, 3, lambda _, x: jnp.tanh(x @ p["fc"]["kernel"] + p["fc"]["bias"][None]), x
      )
      @ p["head"]
    ),
    {"fc": "fc:2", "fc:2": "fc", "fc:3": "fc"},
    {"fc/kernel", "fc/bias", "fc:2/kernel", "fc:2/bias", "fc:3/kernel", "fc:3/bias", "head"},
  ),
  "batch norm after one": (
    {"fc": {"kernel": draw(4, 4)}, "bn": {"scale": draw(4), "bias": draw(4)}},
    lambda p, x: (
      jnp.tanh((x @ p["fc"]["kernel"]) * p["bn"]["scale"][None] + p["bn"]["bias"][None])
      @ p["fc"]["kernel"]
    ),
    {"fc": "fc:2", "fc:2": "fc"},
    {"fc/kernel", "fc/bias", "fc:2/kernel"},
  ),
  "several in one module": (
    {"attn": {"q": draw(4, 4), "k": draw(4, 4)}},
    lambda p, x: jnp.tanh(jnp.tanh(x @ p["attn"]["q"]) @ p["attn"]["k"]) @ p["attn"]["q"],
    {"attn/q": "attn/q:2", "attn/q:2": "attn/q"},
    {"attn/q", "attn/k", "attn/q:2"},
  ),
  "a stack run twice": (
    {"w": draw(2, 4, 4)},
    lambda p, x: jax.lax.fori_loop(
      0, 2, lambda _, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], x
    ),
    {"w/0": "w/0:2", "w/1": "w/1:2", "w/0:2": "w/0", "w/1:2": "w/1"},
    {"w/0", "w/1", "w/0:2", "w/1:2"},
  ),
  "looked up, too": (
    {"embed": {"table": draw(5, 4)}},
    lambda p, x: (
      (p["embed"]["table"][jnp.abs(x).astype(jnp.int32)[:, 0]] + x) @ p["embed"]["table"].T
    ),
    {"embed": "embed/table"},
    {"embed/table", "embed/table:float"},
  ),
  "a stack read as it is, too": (
    {"w": draw(2, 4, 4)},
    lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) + p["w"].sum(),
    {},
    {"w/0", "w/1", "w:float"},
  ),
  "made of the same": (
    {"w": draw(4, 4), "a": draw(4)},
    lambda p, x: jnp.tanh(x @ (p["w"] * 2)) @ (p["w"] + p["a"][None]),
    {},
    {"w", "w:2"},
  ),
  "a bias for two": (
    {"a": draw(4, 4), "c": draw(4, 4), "b": draw(4)},
    lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"] + p["b"][None],
    {},
    {"a", "c", "a_bias", "c_bias"},
  ),
}


@pytest.mark.parametrize(("params", "apply", "shared", "paths"), SHARED.values(), ids=SHARED)
def test_layers_that_share_weights(params, apply, shared, paths):
  assert graph.shared(apply, params, X) == shared
  names = [layer.name for layer in graph.layers(apply, params, X)]
  assert len(set(names)) == len(names) and set(names) >= set(shared)
  weights = graph.weights(apply, params, X)
  for name, other in shared.items():
    if other in weights:
      w, same = np.asarray(weights[name]), np.asarray(weights[other])
      assert np.array_equal(w, same) or np.array_equal(w, same.T)
  assert set(models.flatten(check_fold(apply, params))) == paths


def test_batch_norm_changes_the_weights_of_its_own_layer_alone():
  params, apply, _, _ = SHARED["batch norm after one"]
  _, folded = graph.fold_batch_norm(apply, params, X)
  kernel, scale = params["fc"]["kernel"], params["bn"]["scale"]
  np.testing.assert_allclose(folded["fc"]["kernel"], kernel * scale[None], rtol=1e-6)
  np.testing.assert_array_equal(folded["fc:2"]["kernel"], kernel)


def test_layers_that_would_have_one_name_are_refused():
  params = {"w": draw(4, 4), "w:2": draw(4, 4)}
  apply = lambda p, x: x @ p["w"] @ p["w"] @ p["w:2"]
  with pytest.raises(ValueError, match="params: several layers would be called 'w:2'; rename"):
    graph.layers(apply, params, X)
