"""Calibration against NumPy on the same images; local errors against running each group alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.quant import calibration, grouping, rules
from flexiq_jax.quant.calibration import BINS, RangeSettings
from flexiq_jax.quant.grouping import LowSettings
from tests.layers_for_test import CASES, codes, random_layer


def apply(p, x):
  """Two layers, the second after a ReLU."""
  y = jax.lax.conv_general_dilated(
    x, p["conv"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return jax.nn.relu(y).mean(axis=(1, 2)) @ p["head"]["kernel"]


@pytest.fixture(scope="module")
def network():
  """(params, images, input of the head) of a small network."""
  rng = np.random.default_rng(0)
  params = {
    "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 6)), jnp.float32)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)},
  }
  images = rng.normal(size=(12, 6, 6, 3)).astype(np.float32)
  images[7] *= 3
  inputs = []
  rule = lambda layer, x, w, contract: (inputs.append(x), contract(x, w))[1]
  graph.with_rule(apply, rule)(params, images)
  return params, images, np.asarray(inputs[1])


def split(images, *sizes):
  return np.split(images, np.cumsum(sizes)[:-1])


def test_ranges_and_histograms_are_those_of_the_inputs(network):
  params, images, hidden = network
  values = calibration.observe_values(apply, params, split(images, 5, 5, 2))
  assert list(values) == ["conv", "head"]
  for name, x in (("conv", images), ("head", hidden)):
    seen = values[name]
    # The hidden values may differ by rounding between compiled and plain execution.
    np.testing.assert_allclose([seen.edges[0], seen.edges[-1]], [x.min(), x.max()], rtol=1e-6)
    assert seen.counts.sum() == x.size
    assert (seen.counts.shape, seen.edges.shape) == ((BINS,), (BINS + 1,))
    assert np.all(np.diff(seen.edges) > 0)
    want = np.cumsum(np.histogram(x, seen.edges)[0])
    # A value next to an edge may be on its other side.
    assert np.abs(np.cumsum(seen.counts) - want).max() <= 2
  assert not values["conv"].nonnegative
  assert values["head"].nonnegative


def test_calibration_does_not_depend_on_the_batches(network):
  params, images, _ = network
  cuts = (split(images, 12), split(images, 6, 6))
  together, apart = (calibration.observe_values(apply, params, c) for c in cuts)
  for name in together:
    np.testing.assert_allclose(together[name].edges, apart[name].edges, rtol=1e-6)
    difference = np.cumsum(together[name].counts - apart[name].counts)
    assert np.abs(difference).max() <= 1  # rounding may move a value over an edge
  layers = graph.layers(apply, params, images)
  weights = graph.weights(apply, params, images)
  model = calibration.quantize(layers, weights, together, RangeSettings())
  one, other = (calibration.observe_codes(apply, params, model, c) for c in cuts)
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])
  model = lowered_model(layers, model, one)
  one, other = (calibration.observe_errors(apply, params, model, c) for c in cuts)
  for name in one:
    np.testing.assert_allclose(one[name][0], other[name][0], rtol=1e-5)
    np.testing.assert_allclose(one[name][1], other[name][1], rtol=1e-5)


def lowered_model(layers, model, counts, **changes):
  low_settings = LowSettings(**{"group_size": 2, **changes})
  return {
    layer.name: grouping.lower(
      layer,
      model[layer.name],
      grouping.group_channels(layer, model[layer.name], counts[layer.name], low_settings),
      low_settings,
    )
    for layer in layers
  }


def test_layers_are_quantized_at_their_scales(network):
  params, images, hidden = network
  layers = graph.layers(apply, params, images)
  weights = graph.weights(apply, params, images)
  values = calibration.observe_values(apply, params, [images])
  by_max = RangeSettings(activation="max", weight="max")
  model = calibration.quantize(layers, weights, values, by_max)
  assert (model["conv"].signed, model["head"].signed) == (True, False)
  assert float(model["conv"].x_scale) == pytest.approx(np.abs(images).max() / 127)
  assert float(model["head"].x_scale) == pytest.approx(hidden.max() / 255)
  for name, q in model.items():
    w = np.asarray(weights[name]).reshape(-1, weights[name].shape[-1])
    scale = np.abs(w).max(axis=0) / 127
    np.testing.assert_allclose(q.w_scale, scale, rtol=1e-6)
    want = np.rint(w / np.asarray(q.w_scale))
    np.testing.assert_array_equal(np.asarray(q.w).reshape(w.shape), want)
    assert (q.w.dtype, q.w.shape, q.bits, q.low) == (jnp.int8, weights[name].shape, 8, None)
  always = dataclasses.replace(by_max, unsigned=False)
  assert calibration.quantize(layers, weights, values, always)["head"].signed
  narrow = calibration.quantize(layers, weights, values, by_max, bits=4, keep8=["conv"])
  assert [narrow[name].bits for name in ("conv", "head")] == [8, 4]
  assert (int(narrow["head"].w.min()), int(narrow["head"].w.max())) >= (-8, 7)
  assert np.abs(narrow["head"].w).max() <= 8
  with pytest.raises(ValueError, match="keep8: no layer 'cnov'; closest names: conv"):
    calibration.quantize(layers, weights, values, by_max, keep8=["cnov"])
  with pytest.raises(ValueError, match="values: layer head was not calibrated"):
    calibration.quantize(layers, weights, {"conv": values["conv"]}, by_max)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", ["dense", "dense, two feature dimensions", "grouped"])
def test_code_histograms(name, signed):
  case = CASES[name]
  made = random_layer(case, signed)
  (counts,) = calibration.observe_codes(
    case.apply, made.params, {"w": made.q}, split(made.x, 1, 2)
  ).values()
  x8 = np.asarray(case.layer.channels_last(codes(made.x, 0.5, signed)))
  x8 = x8.reshape(-1, case.layer.in_channels) + (128 if signed else 0)
  want = np.stack([np.bincount(column, minlength=256) for column in x8.T])
  assert counts.dtype == np.int64
  np.testing.assert_array_equal(counts, want)


ERRORS = [
  *((name, True, True) for name in sorted(set(CASES) - {"space first", "dilated"})),
  *((name, False, False) for name in ("dense", "convolution", "grouped")),
]


@pytest.mark.parametrize(("name", "signed", "corrected"), ERRORS)
def test_errors_are_those_of_each_group_alone(name, signed, corrected):
  """Each group put into 4 bits by itself, through the mixed rule."""
  case = CASES[name]
  made = random_layer(case, signed)
  q = made.q
  if corrected:
    bias = np.random.default_rng(5).integers(-5000, 5000, q.low.bias.shape, np.int32)
    q = dataclasses.replace(q, low=dataclasses.replace(q.low, bias=jnp.asarray(bias)))

  @jax.jit
  def outputs(mask):
    rule = rules.mixed_rule({"w": q}, {"w": mask})
    return graph.with_rule(case.apply, rule)(made.params, made.x)

  y8 = np.asarray(outputs(np.zeros(3, bool)), np.float64)
  alone = [np.asarray(outputs(np.arange(3) == j), np.float64) for j in range(3)]
  want = [np.square(y - y8).sum() for y in alone]
  measured = calibration.observe_errors(case.apply, made.params, {"w": q}, [made.x])
  errors, energy = measured["w"]
  np.testing.assert_allclose(errors, want, rtol=1e-4)
  np.testing.assert_allclose(energy, np.square(y8).sum(), rtol=1e-5)
  assert min(want) > 0


def test_errors_are_measured_in_selectable_layers_only(network):
  params, images, _ = network
  layers = graph.layers(apply, params, images)
  weights = graph.weights(apply, params, images)
  values = calibration.observe_values(apply, params, [images])
  model = calibration.quantize(layers, weights, values, RangeSettings())
  counts = calibration.observe_codes(apply, params, model, [images])
  both = lowered_model(layers, model, counts, group_size=4)
  errors = calibration.observe_errors(
    apply, params, {"conv": model["conv"], "head": both["head"]}, [images]
  )
  assert list(errors) == ["head"]
  assert errors["head"][0].shape == (2,)  # groups of 4 and 2 channels


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(network, value):
  params, images, _ = network
  images = images.copy()
  images[3, 0, 0, 0] = value
  with pytest.raises(ValueError, match="batches: the input of layer conv is not finite"):
    calibration.observe_values(apply, params, split(images, 6, 6))


def test_no_batches_are_refused_in_every_pass(network):
  params, images, _ = network
  with pytest.raises(ValueError, match="batches: no calibration batch in pass 'ranges'"):
    calibration.observe_values(apply, params, [])
  with pytest.raises(
    ValueError, match=r"no calibration batch in pass 'histograms'.*anew for every"
  ):
    calibration.observe_values(apply, params, iter([images]))
  case = CASES["dense"]
  made = random_layer(case)
  for observe in (calibration.observe_codes, calibration.observe_errors):
    with pytest.raises(ValueError, match="batches: no calibration batch in pass"):
      observe(case.apply, made.params, {"w": made.q}, [])


def test_progress_is_told(network):
  params, images, _ = network
  told = []
  calibration.observe_values(
    apply, params, split(images, 8, 4), progress=lambda *event: told.append(event)
  )
  assert told == [("ranges", 8), ("ranges", 12), ("histograms", 8), ("histograms", 12)]


def test_constant_inputs_can_be_calibrated(network):
  """All zeros, as after a dead ReLU: a scale there is, and the codes are zero."""
  params, images, _ = network
  for constant in (0.0, 0.5, -2.0):
    x = np.full_like(images, constant)
    values = calibration.observe_values(apply, params, [x])
    layers, weights = graph.layers(apply, params, x), graph.weights(apply, params, x)
    for method in ("max", "percentile", "mse", "joint"):
      q = calibration.quantize(layers, weights, values, RangeSettings(activation=method))["conv"]
      back = codes(x, float(q.x_scale), q.signed) * float(q.x_scale)
      np.testing.assert_allclose(back, x, rtol=0.05)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"activation": "kl"}, "activation: 'kl' is not one of max, percentile, mse, joint"),
    ({"weight": "joint"}, "weight: 'joint' is not one of max, percentile, mse"),
    ({"percentile": 0}, r"percentile: 0 is not in \(0, 100\]"),
    ({"percentile": 100.1}, r"percentile: 100.1 is not in \(0, 100\]"),
  ],
)
def test_refused_settings(arguments, message):
  with pytest.raises(ValueError, match=message):
    RangeSettings(**arguments)
