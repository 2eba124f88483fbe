"""Cut models: head and tail are the model; nothing crosses a cut or runs after it in vain."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph, models
from flexiq_jax.quant.rules import float_rule
from tests.graph import models_for_test
from tests.layers_for_test import CASES
from tests.marks_for_test import slow

SPEC = jax.ShapeDtypeStruct


def integer_rule(layer, x, w, contract):
  """Every layer in integers, in steps of 1/16."""
  codes = [jnp.clip(jnp.round(16 * a), -127, 127).astype(jnp.int8) for a in (x, w)]
  return contract(*codes, jnp.int32).astype(jnp.float32) / 256


RULES = {"float": float_rule, "integer": integer_rule}


def residual_model():
  """A block with a shortcut around two layers; `a` normalizes its weights."""

  def apply(p, x):
    unused = jnp.sin(x)
    h = jax.nn.relu(x @ (p["a"] / jnp.sqrt(jnp.square(p["a"]).sum(axis=0, keepdims=True))))
    y = h + jnp.tanh(h @ p["b"]) @ p["c"] * p["gain"]
    jnp.cos(unused)  # leads nowhere
    return y @ p["d"]

  rng = np.random.default_rng(0)
  sizes = {"a": (6, 4), "b": (4, 5), "c": (5, 4), "d": (4, 3), "gain": (1, 4)}
  params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
  return apply, params, jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)


def token_model():
  """Integers and a narrow type cross the cuts; results on the way; several inputs."""

  def apply(p, x):
    h = p["table"][x["ids"]]
    left = (h.astype(jnp.bfloat16) @ p["left"].astype(jnp.bfloat16)).mean(axis=1)
    right = x["features"] @ p["right"]
    y = (left.astype(jnp.float32) + right) * (x["ids"] > 2).sum(axis=1, keepdims=True)
    return {"y": y @ p["out"], "left": left, "ids": x["ids"], "gain": p["gain"], "one": 1.0}

  rng = np.random.default_rng(0)
  sizes = {"table": (7, 4), "left": (4, 5), "right": (2, 5), "out": (5, 3), "gain": (1,)}
  params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
  ids = jnp.asarray(rng.integers(0, 7, (3, 4)), jnp.int32)
  features = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
  return apply, params, {"features": features, "ids": ids}


def family(name):
  module = models.create(name, **models.MODELS[name].tiny)
  apply, params = models.functional(module)
  x = jax.random.normal(jax.random.key(0), (2, *module.input_shape))
  return apply, models_for_test.randomize(params), x


SMALL = ("nnx", "linen", "plain", "residual", "tokens")
FAMILIES = ("resnet8", "vit_s", "swin_t")


@functools.cache
def made(name):
  """(apply, params, x, names of the layers, the model cut at every layer)."""
  if name in FAMILIES:
    apply, params, x = family(name)
  elif name in models_for_test.MODELS:
    apply, params, x = (*models_for_test.MODELS[name](), models_for_test.image(3))
  else:
    apply, params, x = {"residual": residual_model, "tokens": token_model}[name]()
  names = tuple(layer.name for layer in graph.layers(apply, params, x))
  return apply, params, x, names, graph.cut(apply, params, x, names[::-1])


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)


def every_cut(segments, rule, params, x):
  """Results of every tail, then of all steps one after another."""
  first = live = segments.head(rule)(params, x)
  results = [segments.tail(0, rule)(params, first)]
  for i in range(len(segments.names)):
    live = segments.step(i, rule)(params, live)
    if i + 1 < len(segments.names):
      results.append(segments.tail(i + 1, rule)(params, live))
  return [*results, live]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*SMALL, "resnet8", "vit_s", slow("swin_t")])
def test_every_cut_is_the_model_bit_for_bit(name, rule):
  apply, params, x, names, segments = made(name)
  assert segments.names == names  # in execution order, in whichever they were given
  want = jax.jit(graph.with_rule(apply, RULES[rule]))(params, x)
  results = jax.jit(functools.partial(every_cut, segments, RULES[rule]))(params, x)
  assert len(results) == len(names) + 1
  for got in results:
    assert_same(got, want)


@pytest.mark.parametrize("name", ["nnx", slow("vit_s")])
def test_each_cut_alone_is_the_model_bit_for_bit(name):
  apply, params, x, names, segments = made(name)
  want = jax.jit(graph.with_rule(apply, float_rule))(params, x)
  for i, layer in enumerate(names):
    head = graph.cut(apply, params, x, [layer]).head(float_rule)
    tail = segments.tail(i, float_rule)
    assert_same(jax.jit(lambda p, x: tail(p, head(p, x)))(params, x), want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["linen", "plain", "residual", "tokens"])
def test_every_cut_is_the_model_op_by_op(name, rule):
  apply, params, x, _, segments = made(name)
  want = graph.with_rule(apply, RULES[rule])(params, x)
  for got in every_cut(segments, RULES[rule], params, x):
    assert_same(got, want)


@pytest.mark.parametrize("name", [*SMALL, "resnet8"])
def test_any_batch_size_and_compiled_apart(name):
  """Another batch than that of the trace, arrays from the host; one compiled function each."""
  apply, params, x, names, _ = made(name)
  abstract = jax.tree.map(lambda a: SPEC(a.shape, a.dtype), params)
  one = jax.tree.map(lambda a: SPEC((1, *a.shape[1:]), a.dtype), x)
  segments = graph.cut(apply, abstract, one, [names[-2]])
  head, tail = jax.jit(segments.head(float_rule)), jax.jit(segments.tail(0, float_rule))
  for batch in (1, 5):
    x_batch = jax.tree.map(lambda a: np.resize(a, (batch, *a.shape[1:])), x)
    live = jax.tree.map(np.asarray, head(params, x_batch))
    assert all(a.shape[0] == batch for a in live.values)
    want = jax.jit(graph.with_rule(apply, float_rule))(params, x_batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, tail(params, live), want)


LIVE = {  # at each layer: what crosses, in the order of its computation
  "residual": {
    "a": ["float32[3, 6]"],
    "b": ["float32[3, 4]"],
    "c": ["float32[3, 4]", "float32[3, 5]"],  # the shortcut and the layer's input
    "d": ["float32[3, 4]"],
  },
  "tokens": {
    "left": ["float32[3, 2]", "int32[3, 4]", "bfloat16[3, 4, 4]"],
    "right": ["float32[3, 2]", "int32[3, 4]", "bfloat16[3, 5]"],
    "out": ["int32[3, 4]", "bfloat16[3, 5]", "float32[3, 5]"],  # two of them are results
  },
}


@pytest.mark.parametrize("name", LIVE)
def test_what_crosses_a_cut(name):
  _, params, x, names, segments = made(name)
  live, found = segments.head(float_rule)(params, x), {}
  for i, layer in enumerate(names):
    assert live.at == layer
    assert jax.tree.leaves(live) == list(live.values)
    found[layer] = [f"{a.dtype}{list(a.shape)}" for a in live.values]
    live = segments.step(i, float_rule)(params, live)
  assert found == LIVE[name]


@pytest.mark.parametrize("name", ["nnx", "linen", "plain", "residual", slow("resnet8")])
def test_live_is_minimal(name):
  """Every value depends on the input, and the result on every value."""
  apply, params, x, names, segments = made(name)
  rng = np.random.default_rng(1)
  noise = lambda a: a + rng.normal(size=a.shape).astype("f")
  for i, layer in enumerate(names):
    head = jax.jit(graph.cut(apply, params, x, [layer]).head(float_rule))
    tail = jax.jit(segments.tail(i, float_rule))
    live, other = head(params, x), head(params, noise(x))
    assert live.values
    for a, b in zip(live.values, other.values, strict=True):
      assert not np.array_equal(a, b)
    want = tail(params, live)
    for j, a in enumerate(live.values):
      values = (*live.values[:j], noise(a), *live.values[j + 1 :])
      assert not np.array_equal(tail(params, live.replace(values=values)), want)


def recorded(run, *args):
  """Names of the layers that a rule was called for, and how often each primitive is used."""
  names = []

  def rule(layer, x, w, contract):
    names.append(layer.name)
    return contract(x, w)

  jaxpr = jax.make_jaxpr(run(rule))(*args)
  return tuple(names), collections.Counter(eqn.primitive.name for eqn in jaxpr.jaxpr.eqns)


@pytest.mark.parametrize("name", [*SMALL, "resnet8", "vit_s"])
def test_every_layer_runs_once(name):
  apply, params, x, names, segments = made(name)
  _, whole = recorded(functools.partial(graph.with_rule, apply), params, x)
  live = jax.eval_shape(segments.head(float_rule), params, x)
  for i in range(len(names)):
    first = graph.cut(apply, params, x, [names[i]])
    called, head = recorded(first.head, params, x)
    assert called == names[:i]
    called, tail = recorded(functools.partial(segments.tail, i), params, live)
    assert called == names[i:]
    for primitive in ("dot_general", "conv_general_dilated", "exp", "custom_jvp_call"):
      assert head[primitive] + tail[primitive] == whole[primitive]
    called, _ = recorded(functools.partial(segments.step, i), params, live)
    assert called == (names[i],)
    live = jax.eval_shape(segments.step(i, float_rule), params, live)


def test_equations_of_each_piece():
  """Dynamic equations run once, static ones where they are read, those that lead nowhere never."""
  apply, params, x, names, segments = made("residual")
  live = jax.eval_shape(segments.head(float_rule), params, x)
  found = []
  for i in range(len(names)):
    found.append(recorded(functools.partial(segments.step, i), params, live)[1])
    live = jax.eval_shape(segments.step(i, float_rule), params, live)
  pieces = sum(found, recorded(segments.head, params, x)[1])
  _, whole = recorded(functools.partial(graph.with_rule, apply), params, x)
  assert whole - pieces == {"sin": 1, "cos": 1}
  assert not pieces - whole
  assert [piece["sqrt"] for piece in found] == [1, 0, 0, 0]  # it normalizes a's weights
  assert [piece["tanh"] for piece in found] == [0, 1, 0, 0]


def test_a_static_value_is_computed_in_every_piece_that_reads_it():
  def apply(p, x):
    gain = jnp.exp(p["gain"])
    return (x * gain @ p["a"]) * gain @ p["b"]

  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3)), jnp.float32)
  params, x = {"a": w[0], "b": w[1], "gain": jnp.full((1, 3), 0.5)}, jnp.ones((2, 3))
  segments = graph.cut(apply, params, x, ["b", "a"])
  live = segments.head(float_rule)(params, x)
  assert recorded(segments.head, params, x)[1]["exp"] == 1
  assert recorded(functools.partial(segments.tail, 0), params, live)[1]["exp"] == 1
  assert (
    recorded(
      functools.partial(segments.tail, 1), params, segments.step(0, float_rule)(params, live)
    )[1]["exp"]
    == 0
  )
  assert [a.shape for a in live.values] == [(2, 3)]
  # The parameters count where they are read: those of the tail need not be those of the head.
  other = {**params, "gain": jnp.zeros((1, 3))}
  np.testing.assert_allclose(
    segments.tail(0, float_rule)(other, live), x * np.exp(0.5) @ w[0] @ w[1], rtol=1e-5
  )


def test_a_population_after_one_cut():
  """What cuts are for: many masks of one layer, the layers before it computed once."""
  apply, params, x, names, segments = made("nnx")

  def masked(mask):
    def rule(layer, x, w, contract):
      y = integer_rule(layer, x, w, contract)
      return jnp.where(layer.y_vector(mask, y.shape), y, 0) if layer.name == names[-2] else y

    return rule

  masks = np.random.default_rng(0).random((4, 12)) < 0.5
  live = jax.jit(graph.cut(apply, params, x, names[-2:]).head(integer_rule))(params, x)
  i = len(names) - 2

  @jax.jit
  def behind(params, live, masks):
    return jax.vmap(lambda mask: segments.tail(i, masked(mask))(params, live))(masks)

  whole = jax.jit(lambda mask: graph.with_rule(apply, masked(mask))(params, x))
  results = behind(params, live, masks)
  for got, mask in zip(results, masks, strict=True):
    np.testing.assert_allclose(got, whole(mask), rtol=1e-5, atol=1e-6)
  assert len(np.unique(results, axis=0)) == len(masks)


def test_transformations():
  apply, params, x, _, segments = made("residual")

  def cut_in_two(params, x):
    return segments.tail(2, float_rule)(params, steps(params, segments.head(float_rule)(params, x)))

  def steps(params, live):
    for i in (0, 1):
      live = segments.step(i, float_rule)(params, live)
    return live

  loss = lambda f: jax.grad(lambda p, x: jnp.square(f(p, x)).sum(), argnums=(0, 1))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, loss(cut_in_two)(params, x), loss(apply)(params, x))
  # One example at a time, the live values stacked by vmap.
  live = jax.vmap(lambda x: segments.head(float_rule)(params, x[None]))(x)
  assert [a.shape for a in live.values] == [(3, 1, 6)]
  mapped = jax.vmap(lambda live: segments.tail(0, float_rule)(params, live))(live)
  close(mapped[:, 0], apply(params, x))


def test_segments_are_static():
  apply, params, x, names, segments = made("plain")
  again = graph.cut(apply, params, x, names)
  assert again == segments
  assert hash(again) == hash(segments)
  with pytest.raises(dataclasses.FrozenInstanceError):
    segments.names = names[:1]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ([], "names: no layer to cut at"),
    (["a", "e"], "names: no layer 'e'; closest names: "),
    (["a", "b", "a"], "names: 'a' is there more than once"),
  ],
)
def test_names_that_are_refused(names, message):
  apply, params, x, *_ = made("residual")
  with pytest.raises(ValueError, match=message):
    graph.cut(apply, params, x, names)


def test_closest_names_are_told():
  apply, params, x, *_ = made("nnx")
  with pytest.raises(ValueError, match="no layer 'attn/keys'; closest names: attn/key,"):
    graph.cut(apply, params, x, ["head", "attn/keys"])


def test_cuts_and_live_values_that_are_refused():
  _, params, x, _, segments = made("residual")
  live = segments.head(float_rule)(params, x)
  for i in (-1, 4):
    for run in (segments.step, segments.tail):
      with pytest.raises(ValueError, match=rf"i: no cut {i}; expected 0\.\.3"):
        run(i, float_rule)
  with pytest.raises(ValueError, match="live: of the cut at layer a, expected that at b"):
    segments.tail(1, float_rule)(params, live)
  half = jax.tree.map(lambda a: a[:2], live)
  message = r"live: float32\[2, 6\] at layer a, expected float32\[3, 6\]; choose the batch before"
  with pytest.raises(ValueError, match=message):
    segments.tail(0, float_rule)(params, half)


def costing(macs):
  layer = CASES["dense"].layer
  return [dataclasses.replace(layer, name=f"layer{i}", macs=m) for i, m in enumerate(macs)]


def squares(macs, cuts):
  return sum(sum(macs[a:b]) ** 2 for a, b in itertools.pairwise([*cuts, len(macs)]))


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8), st.data())
def test_balanced_is_the_best_of_all_choices(macs, data):
  k = data.draw(st.integers(1, len(macs)))
  names = graph.balanced(costing(macs), k)
  cuts = [int(name.removeprefix("layer")) for name in names]
  others = itertools.combinations(range(1, len(macs)), k - 1)
  assert len(cuts) == k
  assert cuts[0] == 0
  assert squares(macs, cuts) == min(squares(macs, (0, *rest)) for rest in others)


def test_balanced_by_hand():
  assert graph.balanced(costing([1, 1, 1, 3, 2, 1]), 3) == ("layer0", "layer3", "layer4")
  assert graph.balanced(costing([5, 1, 1, 1]), 2) == ("layer0", "layer1")
  for k in (0, 5):
    with pytest.raises(ValueError, match=rf"k: {k} cuts for 4 layers; expected 1\.\.4"):
      graph.balanced(costing([5, 1, 1, 1]), k)
