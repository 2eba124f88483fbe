"""Layers at widths chosen at run time: exact against `uniform_rule`, simulated against exact."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.methods import layerwise
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.quant import calibration, rules
from flexiq_jax.quant.calibration import RangeSettings
from tests import layers_for_test
from tests.methods import models_for_test as models

BITS = (2, 3, 4, 6, 8)


def uniform(bits):
  return dict.fromkeys(models.NAMES, bits)


def test_exact_rule_is_the_uniform_rule_at_every_width_and_never_compiles_again():
  made = models.made()
  model = layerwise.Layerwise(made.network.apply, made.network.params, made.stacks(BITS))
  for bits in BITS:
    q = calibration.quantize(
      made.network.layers, made.network.weights, made.values, made.ranges, bits
    )
    expected = made.network.uniform(q, made.images)
    # Two programs may fuse the scaling of equal sums in two ways; another code is worth far more.
    np.testing.assert_allclose(
      model.exact(uniform(bits), made.images), expected, rtol=1e-6, atol=2e-7
    )
  assert model.traces["exact"] == 1


def test_exact_rule_mixes_widths_and_floats():
  """Each layer as a rule of its own, put together by name."""
  made = models.made()
  widths = dict(zip(models.NAMES, (8, 2, FLOAT, 4, 6, FLOAT), strict=True))
  quantized = {
    b: calibration.quantize(made.network.layers, made.network.weights, made.values, made.ranges, b)
    for b in (2, 4, 6, 8)
  }

  def by_name(layer, x, w, contract):
    bits = widths[layer.name]
    rule = rules.float_rule if bits == FLOAT else rules.uniform_rule(quantized[bits])
    return rule(layer, x, w, contract)

  expected = graph.with_rule(made.network.apply, by_name)(made.network.params, made.images)
  model = layerwise.Layerwise(made.network.apply, made.network.params, made.stacks(BITS))
  # Another program: the float layers may round in another way.
  np.testing.assert_allclose(model.exact(widths, made.images), expected, rtol=1e-4, atol=1e-5)
  model.exact({**widths, "conv": 6, "head": FLOAT}, made.images)
  assert model.traces["exact"] == 2  # two sets of float layers
  model.exact({**widths, "stem": 3}, made.images)
  assert model.traces["exact"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_simulated_rule_is_close_to_the_exact_one_for_any_choice(seed):
  made = models.made()
  model = models.layerwise_model(BITS)
  widths = np.random.default_rng(seed).choice((*BITS, FLOAT), len(models.NAMES))
  bits = dict(zip(models.NAMES, widths.tolist(), strict=True))
  before = model.traces["simulated"]
  exact, simulated = model.exact(bits, made.images), model.simulated(bits, made.images)
  # Of most images: a sum rounded the other way may move a code after it by one.
  error = np.abs(np.asarray(exact) - np.asarray(simulated)).max(axis=1)
  assert np.median(error) < 1e-5 * np.abs(exact).max()
  assert error.max() < 0.05 * np.abs(exact).max()
  model.simulated(uniform(FLOAT), made.images)
  assert model.traces["simulated"] - before <= 1


def test_float_everywhere_is_the_float_model():
  made, model = models.made(), models.layerwise_model(BITS)
  expected = made.network.float(made.images)
  for run in (model.exact, model.simulated):
    np.testing.assert_allclose(run(uniform(FLOAT), made.images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", layers_for_test.CASES)
def test_both_rules_on_every_kind_of_layer(name, signed):
  """One width of random codes, against int64."""
  case = layers_for_test.CASES[name]
  made, layer = layers_for_test.random_layer(case, signed), case.layer
  low, high = (-127, 127) if signed else (0, 255)
  q = made.q
  stack = layerwise.Stack(
    w=q.w[None],
    w_scale=q.w_scale[None],
    x_scale=q.x_scale[None],
    x_range=jnp.array([[low, high]], jnp.float32),
    signed=signed,
  )
  stacks = layerwise.Stacks((stack,), (layer.name,), (8,), (8,))
  acc = case.exact(layers_for_test.codes(made.x, 0.5, signed), made.w8)
  expected = layers_for_test.scaled(layer, made, acc)
  choice = jnp.zeros(1, jnp.int32)
  for rule in (layerwise.plan_rule(stacks, choice), layerwise.layerwise_rule(stacks, choice)):
    found = graph.with_rule(case.apply, rule)(made.params, made.x)
    np.testing.assert_array_equal(found, expected)  # whole numbers below 2^24, in float32 too


@pytest.mark.parametrize("name", layers_for_test.CASES)
def test_dequantized_weights_of_every_kind_of_layer(name):
  """By what they contract to: scales belong to output channels."""
  case = layers_for_test.CASES[name]
  made, layer = layers_for_test.random_layer(case), case.layer
  stack = layerwise.Stack(
    made.q.w[None], made.q.w_scale[None], made.q.x_scale[None], jnp.zeros((1, 2)), signed=True
  )
  x = np.random.default_rng(0).integers(-9, 9, case.x)
  found = case.contract(jnp.asarray(x, jnp.float32), stack.dequantized(layer, 0))
  acc = case.exact(x, made.w8)
  expected = acc * layer.y_vector(np.asarray(made.q.w_scale, np.float64), acc.shape)
  np.testing.assert_array_equal(found, expected)


def test_inputs_keep_their_own_width():
  made = models.made()
  own, fixed = made.stacks((2, 8)), made.stacks((2, 8), activation_bits=8)
  for mine, other in zip(own.layers, fixed.layers, strict=True):
    np.testing.assert_array_equal(mine.w, other.w)
    np.testing.assert_array_equal(other.x_scale, mine.x_scale[jnp.array([1, 1])])
    np.testing.assert_array_equal(other.x_range, mine.x_range[jnp.array([1, 1])])
  assert made.stacks((2, 8), activation_bits=(8, 4)).activation_bits == (8, 4)


@pytest.mark.parametrize("bits", [2, 8])
def test_one_weight_scale_for_a_whole_layer(bits):
  made = models.made()
  ranges = dataclasses.replace(made.ranges, weight="max")
  stacks = layerwise.create(
    *(made.network.layers, made.network.weights, made.values, ranges),
    bits=(bits,),
    per_channel=False,
  )
  top = 2 ** (bits - 1) - 1
  for name, stack in zip(stacks.names, stacks.layers, strict=True):
    w = np.asarray(made.network.weights[name], np.float64)
    scale = np.abs(w).max() / top
    np.testing.assert_allclose(stack.w_scale, scale, rtol=1e-6)
    low = -127 if bits == 8 else -top - 1
    exact = w / scale
    codes = np.clip(np.rint(exact), low, top)
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-4  # float32 may break ties differently
    np.testing.assert_array_equal(np.asarray(stack.w[0])[sure], codes[sure])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bits": ()}, r"bits: \(\)"),
    ({"bits": (4, 4)}, "all different"),
    ({"bits": (4, 9)}, r"bits: 9; widths of 2\.\.8"),
    ({"bits": (4, 8), "activation_bits": (8,)}, r"activation_bits: \(8,\) for 2 widths"),
    ({"bits": (4, 8), "activation_bits": 1}, "activation_bits: 1"),
  ],
)
def test_wrong_widths_are_refused(options, message):
  made = models.made()
  arguments = (made.network.layers, made.network.weights, made.values, RangeSettings())
  with pytest.raises(ValueError, match=message):
    layerwise.create(*arguments, **options)


def test_layers_without_calibration_are_refused():
  made = models.made()
  values = {name: seen for name, seen in made.values.items() if name != "up"}
  arguments = (made.network.layers, made.network.weights, values, RangeSettings())
  with pytest.raises(ValueError, match="values: layer up was not calibrated"):
    layerwise.create(*arguments, bits=(8,))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"head": 5}, "bits: 5 for layer head"),
    ({"haed": 8}, "no layer 'haed'; closest names: head"),
    ({"head": None}, "bits: none for layer 'head'"),
  ],
)
def test_choices_that_do_not_fit_are_refused(change, message):
  bits = {name: width for name, width in {**uniform(8), **change}.items() if width}
  with pytest.raises(ValueError, match=message):
    models.layerwise_model(BITS).stacks.choice(bits)


def test_models_with_other_layers_are_refused():
  made = models.made()
  stacks = made.stacks((8,))
  fewer = layerwise.Stacks(stacks.layers[1:], stacks.names[1:], (8,), (8,))
  model = layerwise.Layerwise(made.network.apply, made.network.params, fewer)
  with pytest.raises(ValueError, match="layer stem was not quantized"):
    model.exact({name: 8 for name in fewer.names}, made.images)
