"""Scans over stacked layers: the same layers and the same bits as a Python loop over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph
from flexiq_jax.graph.inline import MOST_STEPS
from flexiq_jax.quant import rules
from tests import layers_for_test

STEPS, WIDTH = 4, 4


def made(steps=STEPS, width=WIDTH, seed=0):
  """Parameters with stacked blocks, and the same with a list of blocks."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  blocks = {
    "fc1": {"kernel": draw(steps, width, 6), "bias": draw(steps, 6)},
    "norm": {"scale": draw(steps, width)},
    "fc2": {"kernel": draw(steps, 6, width)},
  }
  rest = {"stem": draw(5, width), "head": draw(width, 3)}
  one = lambda i: jax.tree.map(lambda a: a[i], blocks)
  return {"blocks": blocks, **rest}, {"blocks": [one(i) for i in range(steps)], **rest}


def block(p, x, act=jnp.tanh):
  h = act((x * p["norm"]["scale"][None]) @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
  return x + h @ p["fc2"]["kernel"]


def ends(body):
  return lambda p, x: body(p["blocks"], x @ p["stem"]) @ p["head"]


def loop(blocks, x):
  for p in blocks:
    x = block(p, x)
  return x


def scan(blocks, x, body=block, **options):
  return jax.lax.scan(lambda x, p: (body(p, x), None), x, blocks, **options)[0]


def nested(blocks, x):
  """Scans of two steps inside a scan of two, as for less memory in training."""
  blocks = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), blocks)
  inner = jax.checkpoint(lambda x, p: (scan(p, x), None))
  return jax.lax.scan(inner, x, blocks)[0]


def counted(blocks, x):
  return jax.lax.fori_loop(0, STEPS, lambda i, x: block(jax.tree.map(lambda a: a[i], blocks), x), x)


def second_axis(blocks, x):
  """As MaxText holds its layers; `stacked_second` makes the parameters."""
  return scan(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), blocks), x)


def indexed(blocks, x):
  return loop([jax.tree.map(lambda a: a[i], blocks) for i in range(-STEPS, 0)], x)


FORMS = {
  "scan": scan,
  "remat": lambda blocks, x: scan(blocks, x, jax.checkpoint(block)),
  "jit": lambda blocks, x: jax.jit(scan)(blocks, x),
  "unrolled in part": lambda blocks, x: scan(blocks, x, unroll=2),
  "nested": nested,
  "counted": counted,
  "second axis": second_axis,
  "Python loop over indices": indexed,
}


def coarse(layer, x, w, contract):
  """A rule that rounds, so that weights and activations of another step would be seen."""
  return contract(jnp.round(x * 4) / 4, jnp.round(w * 4) / 4)


def stacked_second(p):
  return {**p, "blocks": jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), p["blocks"])}


@functools.cache
def expected():
  """Of the Python loop: layers, weights, and results and derivatives by a rule."""
  _, listed = made()
  x = jax.random.normal(jax.random.key(0), (3, 5))
  apply = ends(loop)
  run = graph.with_rule(apply, coarse)
  layers = graph.layers(apply, listed, x)
  grad = jax.jit(
    jax.grad(lambda x: graph.with_rule(apply, lambda _, x, w, c: c(x, w))(listed, x).sum())
  )
  single = lambda x: run(listed, x[None])[0]
  return (
    x,
    layers,
    graph.weights(apply, listed, x),
    jax.jit(run)(listed, x),
    jax.jit(jax.vmap(single))(x),
    grad(x),
  )


@pytest.mark.parametrize("form", FORMS)
def test_every_step_is_a_layer_as_in_a_python_loop(form):
  x, layers, weights, result, mapped, grad = expected()
  params = stacked_second(made()[0]) if form == "second axis" else made()[0]
  apply = ends(FORMS[form])
  assert graph.layers(apply, params, x) == layers
  assert [layer.name for layer in layers[:4]] == [
    "stem",
    "blocks/0/fc1",
    "blocks/0/fc2",
    "blocks/1/fc1",
  ]
  found = graph.weights(apply, params, x)
  assert [*found] == [*weights]
  for name in weights:
    np.testing.assert_array_equal(found[name], weights[name])
  run = graph.with_rule(apply, coarse)
  np.testing.assert_array_equal(jax.jit(run)(params, x), result)
  if form in ("remat", "counted"):
    single = lambda x: run(params, x[None])[0]
    np.testing.assert_array_equal(jax.jit(jax.vmap(single))(x), mapped)
    exact = graph.with_rule(apply, lambda _, x, w, c: c(x, w))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: exact(params, x).sum()))(x), grad)
    assert not graph.shared(apply, params, x)


def test_channel_orders_of_steps_are_free_where_they_are_in_a_python_loop():
  stacked, listed = made()
  x = jnp.ones((2, 5))
  lengths = graph.run_lengths(ends(scan), stacked, x)
  assert lengths == graph.run_lengths(ends(loop), listed, x)
  assert {lengths[f"blocks/{i}/fc2"] for i in range(STEPS)} == {1}
  assert {lengths[f"blocks/{i}/fc1"] for i in range(STEPS)} == {0}


def test_results_of_steps_are_stacked_in_their_order():
  w = np.random.default_rng(0).integers(-9, 10, size=(3, 4, 4))  # exact in every order of sums
  w = jnp.asarray(w, jnp.float32)
  for reverse in (False, True):
    apply = lambda p, x: jax.lax.scan(
      lambda c, w: (c + 1, (x @ w * c, c)), jnp.float32(1), p["w"], reverse=reverse
    )
    x = jnp.ones((2, 4))
    run = graph.with_rule(apply, lambda _, x, w, contract: contract(x, w))
    jax.tree.map(np.testing.assert_array_equal, run({"w": w}, x), apply({"w": w}, x))
    names = [layer.name for layer in graph.layers(apply, {"w": w}, x)]
    assert names == (["w/2", "w/1", "w/0"] if reverse else ["w/0", "w/1", "w/2"])


def test_a_loop_that_starts_from_a_constant_has_a_layer_from_the_second_step_on():
  apply = lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: c @ p["w"] + x, jnp.zeros((2, 3)))
  params, x = {"w": jnp.eye(3) * 2}, jnp.ones((2, 3))
  assert [layer.name for layer in graph.layers(apply, params, x)] == ["w", "w:2"]
  run = graph.with_rule(apply, lambda _, x, w, contract: contract(x, w))
  np.testing.assert_array_equal(run(params, x), apply(params, x))


def test_long_scans_are_refused():
  apply = lambda p, x: jax.lax.scan(lambda c, _: (c @ p["w"], None), x, length=MOST_STEPS + 1)[0]
  with pytest.raises(
    ValueError, match=f"w is contracted inside `scan`. It has more than {MOST_STEPS} st"
  ):
    graph.layers(apply, {"w": jnp.eye(3)}, jnp.ones((2, 3)))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
  steps=st.integers(2, 4),
  width=st.integers(2, 5),
  seed=st.integers(0, 99),
  act=st.sampled_from([jax.nn.relu, jnp.tanh, jax.nn.gelu]),
  remat=st.booleans(),
)
def test_quantized_logits_are_those_of_the_loop_bit_for_bit(steps, width, seed, act, remat):
  stacked, listed = made(steps, width, seed)
  body = functools.partial(block, act=act)
  scanned = ends(lambda blocks, x: scan(blocks, x, jax.checkpoint(body) if remat else body))

  def looped(blocks, x):
    for p in blocks:
      x = body(p, x)
    return x

  x = jax.random.normal(jax.random.key(seed), (3, 5))
  results = []
  for apply, params in ((scanned, stacked), (ends(looped), listed)):
    apply, params = graph.fold_batch_norm(apply, params, x)
    layers = graph.layers(apply, params, x)
    results.append((layers, *quantized(apply, params, x, layers)))
  (one, *logits), (two, *others) = results
  assert one == two
  for a, b in zip(logits, others, strict=True):
    np.testing.assert_array_equal(a, b)
  assert len({a.tobytes() for a in logits}) == 3


def quantized(apply, params, x, layers):
  """Logits in floating point, in 8 bits, and with every second channel in 4 bits."""
  weights, model, masks = graph.weights(apply, params, x), {}, {}
  for layer in layers:
    channel = np.arange(layer.in_channels)
    w8 = layers_for_test.codes(weights[layer.name], 0.03, signed=True)
    low = rules.Low(
      w=layers_for_test.lowered(w8, 3, signed=True, half_even=True).astype(np.int8),
      shift=(channel % 5).astype(np.int32),
      group=channel.astype(np.int32),
      bias=np.zeros((layer.in_channels, layer.out_channels), np.float32),
    )
    scale = np.full(layer.out_channels, 0.03, np.float32)
    model[layer.name] = rules.QLayer(
      w=w8.astype(np.int8), w_scale=scale, x_scale=np.float32(0.05), low=low, signed=True
    )
    masks[layer.name] = channel % 2 == 0

  @jax.jit
  def run(model, masks, params, x):
    used = (rules.float_rule, rules.uniform_rule(model), rules.mixed_rule(model, masks))
    return [graph.with_rule(apply, rule)(params, x) for rule in used]

  return [np.asarray(a) for a in run(model, masks, params, x)]
