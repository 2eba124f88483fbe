"""Rules against an int64 oracle, bit for bit, for every kind of layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph
from flexiq_jax.quant import rules
from tests.graph import models_for_test
from tests.layers_for_test import CASES, codes, conv, lowered, random_layer, scaled

MASKS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]], bool)


@functools.cache
def runner(name, platform="cpu", split=False):
  """Every rule on one layer, compiled once: (int8, mixed and dynamic per mask).

  Args:
    name: of the case.
    platform: whose ways of computing products are taken.
    split: whether the precisions are contracted apart.
  """
  case = CASES[name]
  layer = case.layer

  @jax.jit
  def run(q, masks, params, x):
    model = {layer.name: q}

    def mixed(mask, dynamic):
      rule = rules.mixed_rule(model, {layer.name: mask}, dynamic, split=split, platform=platform)
      return graph.with_rule(case.apply, rule)(params, x)

    int8 = graph.with_rule(case.apply, rules.int8_rule(model, platform))(params, x)
    modes = (False, True) if layer.x_rows else (False,)
    return int8, [jax.vmap(functools.partial(mixed, dynamic=d))(masks) for d in modes]

  return case, layer, run


def spread(layer, values, x):
  return np.asarray(layer.x_vector(np.asarray(values), x.shape))


def expected(case, layer, made, mask, shift=None):
  """The mixed layer in int64: operands chosen per channel, one contraction."""
  signed = made.q.signed
  x8 = codes(made.x, 0.5, signed)
  shift = spread(layer, made.shift[made.group], x8) if shift is None else shift
  x4 = lowered(x8, shift, signed, half_even=False)
  channels = mask[made.group]
  x_mix = np.where(spread(layer, channels, x8), x4, x8)
  in_w = np.asarray(layer.w_vector(jnp.asarray(channels)))
  # The same as two products: groups in 4 bits and groups in 8 bits apart.
  apart = case.exact(np.where(spread(layer, channels, x8), x4, 0), made.w4)
  apart = apart + case.exact(np.where(spread(layer, channels, x8), 0, x8), made.w8)
  acc = case.exact(x_mix, np.where(in_w, made.w4, made.w8))
  np.testing.assert_array_equal(acc, apart)
  return scaled(layer, made, acc)


def live_shift(layer, made):
  """The smaller of the static shift and what the example's own range needs, by loops."""
  signed = made.q.signed
  x8 = codes(made.x, 0.5, signed)
  own = np.zeros(x8.shape, np.int64)
  ids = spread(layer, made.group, x8)
  ids = np.broadcast_to(ids, x8.shape)
  for b in range(x8.shape[0]):
    for g, static in enumerate(made.shift):
      members = ids[b] == g
      top = int(np.abs(x8[b][members]).max(initial=0))
      need = max(0, top.bit_length() - (3 if signed else 4))
      own[b][members] = min(int(static), need)
  return own


CONVOLUTIONS = [name for name, case in CASES.items() if case.layer.kind != "dense"]


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
  ("name", "platform", "split"),
  [
    *((name, "cpu", False) for name in CASES),
    *((name, platform, False) for name in CONVOLUTIONS for platform in ("gpu", "tpu")),
    *((name, "gpu", True) for name in CASES),
  ],
)
def test_layers_are_exact(name, platform, split, signed):
  case, layer, run = runner(name, platform, split)
  made = random_layer(case, signed)
  scale = np.array([1.0, 0.1, 0.01])[:, None]  # a loud example and quiet ones
  if layer.x_rows:
    made.x = made.x * np.float32(scale.reshape(3, *[1] * (made.x.ndim - 1)))
  int8, modes = run(made.q, MASKS, made.params, made.x)
  base = case.exact(codes(made.x, 0.5, signed), made.w8)
  np.testing.assert_array_equal(int8, scaled(layer, made, base))
  np.testing.assert_array_equal(modes[0][0], int8)  # nothing in 4 bits: bit-identical
  for mask, got in zip(MASKS, modes[0], strict=True):
    np.testing.assert_array_equal(got, expected(case, layer, made, mask))
  if layer.x_rows:
    own = live_shift(layer, made)
    assert np.any(own < spread(layer, made.shift[made.group], own))
    for mask, got in zip(MASKS, modes[1], strict=True):
      np.testing.assert_array_equal(got, expected(case, layer, made, mask, own))


def test_the_largest_sums_are_exact():
  """Every operand at its largest magnitude, just below the bound of the float path."""
  case = conv((1, 3, 3, 57), (3, 3, 57, 2))
  for signed, code in ((True, -127), (False, 255)):
    q = rules.QLayer(
      w=jnp.full(case.w, 127, jnp.int8).at[..., 1].set(-127).at[0, 0, 0, :].set(126),
      w_scale=jnp.ones(2),
      x_scale=jnp.float32(1),
      signed=signed,
    )
    x = jnp.full(case.x, code, jnp.float32)
    acc = case.exact(np.full(case.x, code), np.asarray(q.w, np.int64))
    apply = lambda p, x: case.contract(x, p["w"])
    got = graph.with_rule(apply, rules.int8_rule({"w": q}))({"w": q.w.astype(jnp.float32)}, x)
    np.testing.assert_array_equal(got, acc)
    assert np.abs(acc).max() > 0.97 * 2**24 or signed


def test_cases_are_what_they_say():
  kinds = {name: (c.layer.kind, c.layer.groups, c.layer.x_rows) for name, c in CASES.items()}
  assert kinds == {
    "dense": ("dense", 1, 1),
    "dense, two feature dimensions": ("dense", 1, 1),
    "dense, shared dimension": ("dense", 2, 1),
    "dense, weights on the left": ("dense", 1, 1),
    "convolution": ("conv", 1, 1),
    "dilated": ("conv", 1, 1),
    "grouped": ("conv", 2, 1),
    "depthwise": ("depthwise", 5, 1),
    "channels first": ("conv", 1, 1),
    "space first": ("conv", 1, 0),
  }


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_random_codes_are_exact(seed, signed, mask):
  case, layer, run = runner("convolution")
  made = random_layer(case, signed, seed=seed)
  masks = np.broadcast_to(np.array(mask), MASKS.shape)
  _, modes = run(made.q, masks, made.params, made.x)
  np.testing.assert_array_equal(modes[0][0], expected(case, layer, made, masks[0]))
  own = live_shift(layer, made)
  np.testing.assert_array_equal(modes[1][0], expected(case, layer, made, masks[0], own))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_uniform_widths_are_exact(bits, signed):
  case, layer, _ = runner("convolution")
  made = random_layer(case, signed)
  lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  w = np.clip(made.w8, lo, hi)
  q = dataclasses.replace(made.q, w=jnp.asarray(w, jnp.int8), low=None, bits=bits)
  x = made.x / 2 ** (8 - bits)
  got = graph.with_rule(case.apply, rules.uniform_rule({"w": q}))(made.params, x)
  acc = case.exact(codes(x, 0.5, signed, bits), w)
  np.testing.assert_array_equal(got, scaled(layer, made, acc))


def test_bias_corrections_of_the_groups_in_4_bits_are_added():
  for name in ("grouped", "dense, shared dimension"):
    case, layer, run = runner(name)
    made = random_layer(case)
    plain = np.asarray(run(made.q, MASKS, made.params, made.x)[1][0])
    bias = np.random.default_rng(1).integers(-999, 999, (3, layer.out_channels), np.int32)
    low = dataclasses.replace(made.q.low, bias=jnp.asarray(bias))
    q = dataclasses.replace(made.q, low=low)
    int8, (got, *_) = run(q, MASKS, made.params, made.x)
    np.testing.assert_array_equal(got[0], int8)  # and to nothing else
    for mask, y, before in zip(MASKS, got, plain, strict=True):
      real = bias[mask].sum(axis=0) * np.asarray(made.q.w_scale * made.q.x_scale)
      want = before + np.asarray(layer.y_vector(real, before.shape))
      np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-5)


def test_mapping_over_masks_is_a_loop_over_them_compiled_once():
  case, _, run = runner("grouped")
  made = random_layer(case, signed=False)
  traces = []

  @jax.jit
  def one(mask):
    traces.append(mask)
    rule = rules.mixed_rule({"w": made.q}, {"w": mask})
    return graph.with_rule(case.apply, rule)(made.params, made.x)

  mapped = run(made.q, MASKS, made.params, made.x)[1][0]
  for mask, together in zip(MASKS, mapped, strict=True):
    np.testing.assert_array_equal(one(mask), together)
  assert len(traces) == 1


def fold_windows(p, x):
  """Windows in the batch dimension, as Swin transformers have them; two layers."""
  x = x.reshape(len(x), 2, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 3)
  x = jax.nn.relu(x @ p["a"]) @ p["b"]
  return x.reshape(-1, 2, 4, 4).mean(axis=(1, 2))


def quantized_windows():
  rng = np.random.default_rng(0)
  params = {"a": jnp.zeros((3, 6)), "b": jnp.zeros((6, 4))}
  model = {}
  for name, (channels, outputs), signed in (("a", (3, 6), True), ("b", (6, 4), False)):
    group = np.arange(channels) // 2
    w = rng.integers(-127, 128, (channels, outputs))
    model[name] = rules.QLayer(
      w=jnp.asarray(w, jnp.int8),
      w_scale=jnp.full(outputs, 0.01),
      x_scale=jnp.float32(0.02),
      low=rules.Low(
        w=jnp.asarray(lowered(w, 4, True, half_even=True), jnp.int8),
        shift=jnp.full(channels, 4, jnp.int32),
        group=jnp.asarray(group, jnp.int32),
        bias=jnp.zeros((group[-1] + 1, outputs), jnp.int32),
      ),
      signed=signed,
    )
  masks = {name: np.ones(len(q.low.bias), bool) for name, q in model.items()}
  # Of very different loudness, so that live shifts differ from example to example.
  x = rng.normal(size=(4, 8, 3)) * np.array([0.02, 1, 0.1, 3]).reshape(4, 1, 1)
  return params, model, masks, x.astype(np.float32)


def test_dynamic_shifts_do_not_depend_on_batch_mates():
  params, model, masks, x = quantized_windows()
  rows = [layer.x_rows for layer in graph.layers(fold_windows, params, x)]
  assert rows == [2, 2]
  run = jax.jit(graph.with_rule(fold_windows, rules.mixed_rule(model, masks, dynamic=True)))
  together = np.asarray(run(params, x))
  order = np.array([2, 0, 3, 1])
  np.testing.assert_array_equal(run(params, x[order]), together[order])
  louder = x.copy()
  louder[3] *= 50
  np.testing.assert_array_equal(run(params, louder)[:3], together[:3])
  for i in range(4):
    np.testing.assert_array_equal(run(params, x[i : i + 1])[0], together[i])
  static = jax.jit(graph.with_rule(fold_windows, rules.mixed_rule(model, masks)))(params, x)
  changed = np.any(np.asarray(static) != together, axis=1)
  assert changed[0] and not changed[3]  # quiet examples keep more bits, loud ones the static


def test_dynamic_shifts_of_a_block_follow_its_4_bit_channels():
  case = CASES["dense"]
  made = random_layer(case, groups=5)
  made.x = made.x * np.float32(2) ** -(made.group + np.arange(len(made.x))[:, None])
  shift = np.full(case.layer.in_channels, 3)
  block = made.group // 2  # of groups 0 and 1, 2 and 3, and 4
  low = dataclasses.replace(made.q.low, shift=jnp.asarray(shift), block=jnp.asarray(block))
  q = dataclasses.replace(made.q, low=low)
  mask = np.array([True, False, True, True, False])
  x8 = codes(made.x, 0.5, True)
  own = np.zeros(x8.shape, np.int64)
  for b, j in np.ndindex(len(x8), 3):
    members = (block == j) & mask[made.group]
    top = int(np.abs(x8[b][members]).max(initial=0))
    own[b][members] = min(3, max(0, top.bit_length() - 3))
  rule = rules.mixed_rule({"w": q}, {"w": jnp.asarray(mask)}, dynamic=True)
  got = graph.with_rule(case.apply, rule)(made.params, made.x)
  np.testing.assert_array_equal(got, expected(case, case.layer, made, mask, own))
  assert len(np.unique(own[:, mask[made.group]])) > 2


def test_dynamic_shifts_are_refused_where_examples_are_not_known():
  params, model, masks, x = quantized_windows()

  def tokens_first(p, x):
    return jax.nn.relu(x.transpose(1, 0, 2) @ p["a"]) @ p["b"]

  run = graph.with_rule(tokens_first, rules.mixed_rule(model, masks, dynamic=True))
  with pytest.raises(ValueError, match=r"dynamic: .* layer a is not known to hold the examples"):
    run(params, x)
  # The way out that the message names: one example at a time.
  single = jax.jit(jax.vmap(lambda x: run(params, x[None])[:, 0]))(x)
  alone = jax.jit(run)
  for i in range(4):
    np.testing.assert_array_equal(alone(params, x[i : i + 1])[:, 0], single[i])


def test_float_and_observe_rules_compute_the_model():
  apply, params = models_for_test.plain_model()
  x = models_for_test.image()
  top = lambda layer, x: jnp.abs(x).max()
  y, records = jax.jit(rules.observing(apply, top))(params, x)
  np.testing.assert_allclose(y, jax.jit(apply)(params, x), rtol=1e-6)
  assert set(records) == {"stem", "heads", "out"}
  assert float(records["stem"]) == float(jnp.abs(x).max())
  half = lambda layer, x, w, contract: contract(x, w) / 2
  y, records = jax.jit(rules.observing(apply, top, half))(params, x)
  want = jax.jit(graph.with_rule(apply, half))(params, x)
  np.testing.assert_allclose(y, want, rtol=1e-6)


def test_layers_without_a_mask_stay_8_bit():
  params, model, masks, x = quantized_windows()
  int8 = graph.with_rule(fold_windows, rules.int8_rule(model))(params, x)
  none = graph.with_rule(fold_windows, rules.mixed_rule(model, {}))(params, x)
  np.testing.assert_array_equal(none, int8)
  only_b = graph.with_rule(fold_windows, rules.mixed_rule(model, {"b": masks["b"]}))(params, x)
  off = {"a": ~masks["a"], "b": masks["b"]}
  np.testing.assert_array_equal(
    only_b, graph.with_rule(fold_windows, rules.mixed_rule(model, off))(params, x)
  )
  assert not np.array_equal(only_b, int8)


def test_refused_models_and_masks():
  params, model, masks, x = quantized_windows()
  bare = {name: dataclasses.replace(q, low=None) for name, q in model.items()}
  narrow = {**model, "b": dataclasses.replace(model["b"], bits=4)}
  with pytest.raises(ValueError, match=r"model: layers that are not 8-bit: b \(4\)"):
    rules.int8_rule(narrow)
  for wrong, mask, message in (
    (bare, masks, "masks: layer a has no 4-bit side"),
    (narrow, masks, "masks: layer b has no 4-bit side"),
    (model, {"c": masks["b"]}, "masks: no layer 'c'; closest names:"),
    (model, {"a": masks["b"]}, r"masks: layer a needs bool \[2\], .* not bool \[3\]"),
    (model, {"a": masks["a"].astype(int)}, r"masks: layer a needs bool \[2\], .* not int64 \[2\]"),
  ):
    with pytest.raises(ValueError, match=message):
      rules.mixed_rule(wrong, mask)
  for rule in (rules.int8_rule({"a": model["a"]}), rules.mixed_rule({"a": model["a"]}, {})):
    with pytest.raises(ValueError, match="model: layer b was not quantized; quantized are a"):
      graph.with_rule(fold_windows, rule)(params, x)
