"""QuantuneV2's two runs against sums in NumPy; lists and plans by their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import io_callback

from flexiq_jax import graph
from flexiq_jax.methods import fusion
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.quantune import forms, ranking
from flexiq_jax.methods.quantune import runs as two_runs
from flexiq_jax.quant import calibration, rules
from flexiq_jax.quant.calibration import RangeSettings
from tests.methods.quantune.metrics_for_test import nmse

WIDTH = 8
LAYERS = ("a", "b", "c", "d", "head")
FREE = LAYERS[:-1]


def apply(params, x):
  """Two residual blocks of two layers, and a head."""
  for first, second in (("a", "b"), ("c", "d")):
    y = jax.nn.relu(x @ params[first] + params["bias"][None])
    x = jax.nn.relu(x + y @ params[second])
  return x @ params["head"]


@functools.cache
def model():
  rng = np.random.default_rng(0)
  shape = lambda name: (WIDTH, 3 if name == "head" else WIDTH)
  params = {n: jnp.asarray(rng.normal(size=shape(n)) / WIDTH**0.5, jnp.float32) for n in LAYERS}
  params["bias"] = jnp.asarray(rng.normal(size=WIDTH) / 4, jnp.float32)
  return params, rng.normal(size=(64, WIDTH)).astype(np.float32)


@functools.cache
def low_rule(low, layers):
  """`layers` at `low` bits, the others as they are."""
  params, images = model()
  found = graph.layers(apply, params, images)
  values = calibration.observe_values(apply, params, [images])
  weights = graph.weights(apply, params, images)
  quantized = rules.uniform_rule(
    calibration.quantize(found, weights, values, RangeSettings(), bits=low)
  )

  def rule(layer, x, w, contract):
    return quantized(layer, x, w, contract) if layer.name in layers else contract(x, w)

  return rule


@functools.cache
def runs(low=4, layers=LAYERS):
  params, images = model()
  return two_runs.measure(apply, params, low_rule(low, layers), [images])


def outputs(x, params, rule=None):
  """The outputs of layers, in order, by a rule or not."""
  seen = []

  def keep(layer, x, w, contract):
    y = (rule or rules.float_rule)(layer, x, w, contract)
    seen.append(y)
    return y

  graph.with_rule(apply, keep)(params, x)
  return [np.asarray(y, np.float64) for y in seen]


def test_sums_of_layers():
  params, images = model()
  found = runs()
  float_, low = outputs(images, params), outputs(images, params, low_rule(4, LAYERS))
  numbers = [i for i, o in enumerate(found.operations) if o.kind == "layer"]
  np.testing.assert_allclose(found.energy[numbers], [(a**2).sum() for a in float_], rtol=1e-5)
  errors = [((a - q) ** 2).sum() for a, q in zip(float_, low, strict=True)]
  np.testing.assert_allclose(found.error[numbers], errors, rtol=1e-3)
  spans = [max(a.max(), 0) - min(a.min(), 0) for a in float_]
  np.testing.assert_allclose(found.span[numbers], spans, rtol=1e-5)
  np.testing.assert_array_equal(found.count[numbers], [a.size for a in float_])
  expected = [nmse(a, q) for a, q in zip(float_, low, strict=True)]
  np.testing.assert_allclose(found.nmse(numbers), expected, rtol=1e-3)


def test_batches_add_up():
  params, images = model()
  whole = runs()
  parts = two_runs.measure(apply, params, low_rule(4, LAYERS), [images[:32], images[32:]])
  np.testing.assert_allclose(parts.energy, whole.energy, rtol=1e-5)
  np.testing.assert_allclose(parts.error, whole.error, rtol=1e-3)
  np.testing.assert_allclose(parts.span, whole.span, rtol=1e-6)
  np.testing.assert_array_equal(parts.count, whole.count)


def test_exactly_two_evaluations():
  params, images = model()
  seen = []

  def counted(params, x):
    zero = io_callback(lambda: seen.append(1) or np.float32(0), jax.ShapeDtypeStruct((), "f4"))
    return apply(params, x + zero)

  found = two_runs.measure(counted, params, low_rule(4, LAYERS), [images])
  for pair in ((4, 8), (8, FLOAT)):
    for budget in (0, 2, 4):
      forms.choose(found, FREE, pair, None, budget)
  assert len(seen) == 2


def test_work_is_linear_in_the_number_of_layers():
  """Each layer is computed once by the rule, and each node is listed once."""
  for depth in (3, 12):
    params = {f"w{i:02}": jnp.eye(2) for i in range(depth)}
    calls = []

    def chain(params, x):
      for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
      return x

    def rule(layer, x, w, contract, calls=calls):
      calls.append(layer.name)
      return contract(x, w)

    found = two_runs.measure(chain, params, rule, [np.ones((2, 2), np.float32)])
    assert calls == sorted(params)
    assert len(found.operations) == 2 * depth
    assert len(fusion.nodes(found.operations, "residual")) == depth


def test_the_same_rule_twice_loses_nothing():
  params, images = model()
  found = two_runs.measure(apply, params, rules.float_rule, [images])
  assert not found.error.any()
  for grouping in fusion.GROUPINGS:
    listed = forms.ranked(found, grouping, FREE)
    assert np.isinf(listed.sqnr).all()
    assert not listed.delta[1:].any()  # the first reads the images, which are as exact
    assert listed.ranking == FREE


@pytest.mark.parametrize("name", FREE)
def test_a_layer_that_receives_no_error_loses_what_it_adds(name):
  listed = forms.ranked(runs(4, (name,)), "unfused", FREE)
  at = {node.name: v for v, node in enumerate(listed.nodes)}
  delta = listed.delta[at[name]]
  assert delta == pytest.approx(ranking.EXACT - listed.sqnr[at[name]])
  assert delta > 0
  assert all(listed.nmse[at[n]] == 0 for n in FREE[: FREE.index(name)])


@pytest.mark.parametrize("name", LAYERS)
def test_high_precision_never_raises_a_layers_own_error(name):
  found, other = runs(), runs(4, tuple(n for n in LAYERS if n != name))
  number = next(i for i, o in enumerate(found.operations) if o.layer == name)
  assert other.error[number] < found.error[number]


def test_predicted_rounding_is_that_of_noise():
  """An output spread evenly over its range, rounded to its bits."""
  rng = np.random.default_rng(0)
  params = {"w": jnp.eye(1)}
  x = rng.uniform(0, 1, size=(100_000, 1)).astype(np.float32)
  found = two_runs.measure(lambda p, x: x @ p["w"], params, rules.float_rule, [x])
  for bits in (4, 8):
    step = x.max() / (2**bits - 1)
    actual = nmse(x, np.round(x / step) * step)
    assert found.rounding(0, bits) == pytest.approx(actual, rel=0.02)
  assert found.rounding(0, FLOAT) == 0


def test_list_does_not_depend_on_the_order_of_names():
  for grouping in fusion.GROUPINGS:
    lists = [forms.ranked(runs(), grouping, names) for names in (FREE, FREE[::-1])]
    assert lists[0].ranking == lists[1].ranking
    assert lists[0].score == lists[1].score


def test_allocation():
  listed = forms.ranked(runs(), "residual", FREE)
  plan = forms.allocate(runs(), listed, (4, 8), None, 2)
  assert plan.bits == {n: 8 if n in listed.ranking[:2] else 4 for n in listed.ranking}
  # The head may not be lowered and stays at 8 bits; all nodes are layers here.
  bits = [*(plan.bits[n] for n in FREE), 8]
  assert plan.node_bits.tolist() == bits
  edges = [(bits[p], bits[v]) for v, n in enumerate(listed.nodes) for p in n.inputs]
  assert plan.boundaries == sum(a != b for a, b in edges)
  error = sum(listed.nmse[v] for v, n in enumerate(FREE) if plan.bits[n] == 4)
  error += sum(
    runs().rounding(n.operations[-1], b) for n, b in zip(listed.nodes, bits, strict=True)
  )
  assert plan.error == pytest.approx(error)
  assert plan.value == pytest.approx(error + 0.01 * plan.boundaries)


def test_extremes_of_the_budget():
  for pair in ((4, 8), (8, FLOAT)):
    low, high = pair
    for plan in forms.choose(runs(), FREE, pair, None, 0):
      assert set(plan.bits.values()) == {low}
    for plan in forms.choose(runs(), FREE, pair, None, len(FREE)):
      assert set(plan.bits.values()) == {high}
      assert plan.boundaries == (pair == (8, FLOAT))  # the head, kept at 8 bits
  everything_high = forms.choose(runs(), FREE, (4, 8), None, len(FREE))
  assert all(plan.boundaries == 0 for plan in everything_high)


@given(budget=st.floats(0, 5), penalty=st.sampled_from([0.0, 0.01, 100.0]))
def test_the_best_form_comes_first(budget, penalty):
  plans = forms.choose(runs(), FREE, (4, 8), None, budget, penalty=penalty)
  assert {p.grouping for p in plans} == set(fusion.GROUPINGS)
  values = [p.error + penalty * p.boundaries for p in plans]
  assert values == sorted(values)
  if penalty == 100:
    assert plans[0].boundaries == min(p.boundaries for p in plans)


@given(st.floats(0, 700), st.floats(0, 700))
def test_filling_uses_the_budget(one, other):
  params, images = model()
  layers = graph.layers(apply, params, images)
  extra = {layer.name: 4 * layer.macs for layer in layers if layer.name in FREE}
  order = forms.ranked(runs(), "residual", FREE).ranking
  for budget in (one, other):
    head, filled = (set(ranking.allocate(order, extra, budget, fill=f)) for f in (False, True))
    assert head <= filled
    left = budget - sum(extra[n] for n in filled)
    assert left >= 0
    assert all(extra[n] > left for n in set(order) - filled)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda r: forms.ranked(r, "norm", ("a", "e")), r"names: no layer 'e'; closest"),
    (lambda r: forms.choose(r, FREE, (8, 4), None, 1), r"pair: \(8, 4\); expected low"),
    (lambda r: forms.choose(r, FREE, (4, 8), None, -1), r"budget: -1; expected at least 0"),
    (
      lambda r: forms.choose(r, FREE, (4, 8), None, 1, penalty=-1),
      r"penalty: -1; expected at least 0",
    ),
    (
      lambda r: forms.choose(r, FREE, (4, 8), None, 1, groupings=()),
      r"groupings: empty; expected at least one",
    ),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call(runs())


def test_refuses_no_images_and_infinite_outputs():
  params, images = model()
  with pytest.raises(ValueError, match="batches: there are none"):
    two_runs.measure(apply, params, rules.float_rule, [])
  with pytest.raises(ValueError, match="batches: the output of operation 0 is not finite"):
    two_runs.measure(apply, params, rules.float_rule, [images * np.inf])
