"""Effects of channel groups from backward passes, against integers and against autodiff."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.quant import lowering, quantizer, rules
from flexiq_jax.search.gram import influence as module
from flexiq_jax.search.gram.influence import Influence, influence_rule
from flexiq_jax.search.gram.surrogate import ledoit_wolf
from flexiq_jax.search.gram.ties import Ties
from tests import layers_for_test
from tests.search import networks_for_test
from tests.search.networks_for_test import influence, made

APART = {name: case for name, case in layers_for_test.CASES.items() if name != "space first"}


def prepared(case, signed):
  """A random layer with integer corrections, and what each of its three groups brings, `e_g`."""
  random, layer = layers_for_test.random_layer(case, signed), case.layer
  bias = np.random.default_rng(5).integers(-99, 99, (3, layer.out_channels))
  low = dataclasses.replace(random.q.low, bias=jnp.asarray(bias, jnp.int32))
  random = dataclasses.replace(random, q=dataclasses.replace(random.q, low=low))
  codes = layers_for_test.codes(random.x, 0.5, signed)
  shift = np.asarray(layer.x_vector(random.shift[random.group], case.x))
  x4 = layers_for_test.lowered(codes, shift, signed, half_even=False)
  effects = []
  for g in range(3):
    mine = np.asarray(layer.x_vector(random.group == g, case.x))
    change = case.exact(x4 * mine, random.w4) - case.exact(codes * mine, random.w8)
    effects.append(change + np.asarray(layer.y_vector(bias[g], change.shape)))
  scale = np.asarray(random.q.w_scale, np.float64) * 0.5
  effects = np.stack([e * np.asarray(layer.y_vector(scale, e.shape)) for e in effects])
  return random, effects, codes, x4


def examples_first(layer, y):
  """`[..]` of y -> `[B, rest]`."""
  rest = [d for d in range(layer.y_ndim) if d not in layer.y_dims]
  return np.transpose(y, [*rest, *layer.y_dims]).reshape(y.shape[rest[0]], -1)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", APART)
def test_effects_of_a_layer_are_those_of_integers(name, signed):
  case = APART[name]
  random, effects, codes, x4 = prepared(case, signed)
  layer, model = case.layer, {case.layer.name: random.q}
  v = np.random.default_rng(6).integers(-4, 5, effects.shape[1:]).astype(np.float32)
  gates = {layer.name: jnp.zeros((3, 3), jnp.float32)}

  @jax.jit
  def both(mask, gates, x):
    masks = {layer.name: mask}
    run = lambda gates, x: graph.with_rule(case.apply, influence_rule(model, masks, gates))(
      random.params, x
    )
    y, pull = jax.vjp(run, gates, x)
    mixed = graph.with_rule(case.apply, rules.mixed_rule(model, masks))(random.params, x)
    return y, mixed, *pull(jnp.asarray(v))

  for mask in ([False] * 3, [True, False, True], [True] * 3):
    mask = np.array(mask)
    y, mixed, found, dx = both(mask, gates, random.x)
    np.testing.assert_array_equal(y, mixed)
    expected = np.stack(
      [examples_first(layer, e * v).sum(axis=1) for e in effects], axis=1
    ) * np.where(mask, -1, 1)
    assert np.abs(expected).min() > 0
    np.testing.assert_allclose(found[layer.name], expected, rtol=1e-4, atol=1e-3)
    # By x: the weights of its side, a stop where a code is saturated.
    low = np.asarray(layer.x_vector(mask[random.group], case.x))
    inside = (random.x / 0.5 >= codes - 0.5) & (random.x / 0.5 <= codes + 0.5)
    shift = np.asarray(layer.x_vector(random.shift[random.group], case.x))
    inside &= ~low | (np.abs(x4 - codes) <= 2.0**shift / 2)
    assert inside.mean() > 0.2
    slopes = []
    for w in (random.w8, random.w4):
      w = jnp.asarray(w, jnp.float32)
      scaled = lambda x, w=w: (
        case.contract(x, w) * layer.y_vector(random.q.w_scale, effects.shape[1:])
      )
      slopes.append(np.asarray(jax.grad(lambda x, f=scaled: (f(x) * v).sum())(random.x)))
    expected = np.where(low, slopes[1], slopes[0]) * inside
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-3)


def test_examples_that_are_mixed_up_are_refused():
  case = layers_for_test.CASES["space first"]
  random, layer = layers_for_test.random_layer(case), case.layer
  masks, gates = {layer.name: np.zeros(3, bool)}, {layer.name: jnp.zeros((3, 3))}
  rule = influence_rule({layer.name: random.q}, masks, gates)
  with pytest.raises(ValueError, match=f"layer {layer.name}: .* not known to hold the examples"):
    graph.with_rule(case.apply, rule)(random.params, random.x)


def reference_rule(model, masks, gates):
  """Fake quantization in floats for autodiff, and gates that let each group change sides."""

  def through(value, x, inside):
    """`value`, with the derivative of x where `inside`."""
    value = value.astype(jnp.float32)
    return jax.lax.stop_gradient(value) + jnp.where(inside, x - jax.lax.stop_gradient(x), 0)

  def rule(layer, x, w, contract):
    q = model[layer.name]
    steps, (lo, hi) = x / q.x_scale, quantizer.code_range(8, q.signed)
    inside = (steps >= lo - 0.5) & (steps <= hi + 0.5)
    codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
    x8, w8 = through(codes, steps, inside), q.w.astype(jnp.float32)
    scale = lambda y: y * layer.y_vector(q.w_scale * q.x_scale, y.shape)
    if layer.name not in masks:
      return scale(contract(x8, w8))
    low, mask, y = q.low, masks[layer.name], 0.0
    shift = layer.x_vector(low.shift, x.shape)
    lowered = lowering.lower_activations(codes, shift, q.signed) << shift
    x4 = through(lowered, steps, inside & (jnp.abs(lowered - codes) <= 2.0**shift / 2))
    for g in range(len(mask)):
      mine = layer.x_vector(low.group == g, x.shape)
      low_side = contract(x4 * mine, low.w.astype(jnp.float32))
      low_side += layer.y_vector(low.bias[g].astype(jnp.float32), low_side.shape)
      high_side = contract(x8 * mine, w8)
      now, then = (low_side, high_side) if mask[g] else (high_side, low_side)
      gate = gates[layer.name][:, g].reshape(-1, *[1] * (now.ndim - 1))
      y += now + gate * jax.lax.stop_gradient(then - now)
    return scale(y)

  return rule


@functools.cache
def jacobian(number):
  """Logits `[B, K]`, and effects of all groups `[B, K, T]` by autodiff, around a random mask."""
  m = made()
  mask = m.random_masks(4)[number]
  masks = {name: tuple(own.tolist()) for name, own in m.space.split(mask).items()}
  masks = {name: np.array(own) for name, own in masks.items()}

  @jax.jit
  def of(gates, x):
    return graph.with_rule(m.network.apply, reference_rule(m.model, masks, gates))(
      m.network.params, x[None]
    )[0]

  zeros = {name: jnp.zeros((1, len(own))) for name, own in masks.items()}
  logits = jax.jit(jax.vmap(lambda x: of(zeros, x)))(m.images)
  parts = jax.jit(jax.vmap(lambda x: jax.jacrev(of)(zeros, x)))(m.images)
  effects = np.concatenate([parts[name][:, :, 0] for name in m.space.names], axis=2)
  return mask, np.asarray(logits, np.float64), effects.astype(np.float64)


def test_examples_stay_apart():
  m, (mask, _, effects) = made(), jacobian(2)
  x, masks = m.images[:3], m.space.split(mask)

  @jax.jit
  def of(gates):
    rule = influence_rule(m.model, masks, gates)
    return graph.with_rule(m.network.apply, rule)(m.network.params, x)

  gates = {name: jnp.ones((3, len(own))) for name, own in masks.items()}
  # Whatever the gates; another program, so up to rounding.
  np.testing.assert_allclose(of(gates), m.logits(mask)[:3], rtol=1e-5, atol=1e-6)
  parts = jax.jit(jax.jacrev(of))(gates)
  found = np.concatenate([parts[name] for name in m.space.names], axis=3)  # [B, K, B, T]
  for b in range(3):
    np.testing.assert_allclose(found[b, :, b], effects[b], rtol=1e-3, atol=1e-5)
    assert (np.delete(found[b], b, axis=1) == 0).all()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_measurement_is_that_of_autodiff(number):
  mask, logits, effects = jacobian(number)
  measured = influence()
  fitness = networks_for_test.fitness()
  np.testing.assert_allclose(logits, made().logits(mask), rtol=1e-4, atol=1e-5)
  fitness.forwards = 0.0
  quadratic, share = measured.measure(jax.random.key(0), mask)
  assert fitness.forwards == 3 * (6 if mask.any() else 5)
  grams = effects.mT @ effects
  residual = logits - fitness.reference
  size = np.abs(grams.mean(axis=0)).max()
  np.testing.assert_allclose(quadratic.gram, grams.mean(axis=0), rtol=1e-3, atol=1e-5 * size)
  expected = np.einsum("bk,bkt->t", residual, effects) / 16
  np.testing.assert_allclose(
    quadratic.gradient, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max()
  )
  np.testing.assert_allclose(quadratic.value, fitness(mask[None])[0], rtol=1e-5)
  expected = ledoit_wolf(grams.mean(axis=0), np.square(grams).mean(axis=0), 16)
  np.testing.assert_allclose(share, expected, rtol=1e-3)


def test_blocks_and_ties_change_nothing():
  mask, _, _ = jacobian(2)
  whole, _ = influence().measure(jax.random.key(0), mask)
  shares = []
  cut, _ = influence(block=6).measure(jax.random.key(1), mask, shares.append)  # 6, 6 and 4 examples
  assert shares == [6 / 16, 12 / 16, 1]
  for field in ("value", "gradient", "gram"):
    a, b = getattr(whole, field), getattr(cut, field)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
  tied = influence(limit=10)
  assert tied.ties.space.total == 9
  base = np.arange(9) % 3 == 0
  around = tied.ties.expand(base)
  single, _ = influence().measure(jax.random.key(0), around)
  both, _ = tied.measure(jax.random.key(0), base)
  member = np.eye(9)[tied.ties.of]
  # Groups of a tie change sides together, so effects add.
  np.testing.assert_allclose(both.gram, member.T @ single.gram @ member, rtol=1e-4, atol=1e-8)
  np.testing.assert_allclose(both.gradient, single.gradient @ member, rtol=1e-3, atol=1e-7)


def test_prediction_is_exact_where_nothing_follows():
  """Groups of the last layer move the logits by their effects, to the last bit but rounding."""
  m, fitness = made(), networks_for_test.fitness()
  base = m.random_masks(4)[2]
  masks = np.repeat(base[None], 16, axis=0)
  masks[:, -4:] = (np.arange(16)[:, None] >> np.arange(4)) % 2 == 1
  quadratic, _ = influence().measure(jax.random.key(0), base)
  np.testing.assert_allclose(quadratic.predict(masks), fitness(masks), rtol=1e-4)


@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_prediction_is_close_to_the_truth(distance):
  """16 examples of a narrow network; roundings after a layer are what is not predicted."""
  m, fitness = made(), networks_for_test.fitness(distance=distance)
  masks = m.random_masks(40, seed=3)[2:]
  quadratic, _ = influence(100 if distance == "kl" else 5, distance).measure(
    jax.random.key(0), np.zeros(m.space.total, bool)
  )
  predicted, true = quadratic.predict(masks), fitness(masks)
  off = np.abs(np.log(predicted / true))
  assert off.max() < np.log(1.7)
  assert np.median(off) < 0.2
  assert np.corrcoef(np.log(predicted), np.log(true))[0, 1] > 0.9


def test_random_probes_are_right_in_the_mean():
  mask, _, effects = jacobian(2)
  exact = np.einsum("bkt,bku->tu", effects, effects) / 16
  measured = influence(probes=2)
  assert "2 random probes on 16 examples" in measured.describe()
  assert "5 (all logits) probes" in influence().describe()
  samples = [measured.measure(jax.random.key(seed), mask)[0].gram for seed in range(60)]
  _check_mean(np.array(samples), exact)


def test_divergence_is_measured_to_second_order():
  mask, logits, effects = jacobian(2)
  p, p8 = (np.exp(z - np.log(np.exp(z).sum(axis=1, keepdims=True))) for z in (logits, reference()))
  metric = (np.eye(5) * p[:, None] - p[:, :, None] * p[:, None]) / 2
  exact = np.einsum("bkt,bkl,blu->tu", effects, metric, effects) / 16
  measured = influence(probes=6, distance="kl")  # no logit by itself, though there are but five
  samples = [measured.measure(jax.random.key(seed), mask)[0] for seed in range(40)]
  _check_mean(np.array([s.gram for s in samples]), exact)
  gradient = np.einsum("bk,bkt->t", (p - p8) / 2, effects) / 16
  np.testing.assert_allclose(
    samples[0].gradient, gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max()
  )
  # Moving the logits along all effects at once: value and two derivatives of the divergence.
  s = np.random.default_rng(0).random(len(mask))

  def divergence(t):
    z = logits + t * effects @ s
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return (p8 * (np.log(p8) - log_p)).sum(axis=1).mean()

  h = 1e-3
  slope = (divergence(h) - divergence(-h)) / (2 * h)
  curve = (divergence(h) + divergence(-h) - 2 * divergence(0)) / h**2
  np.testing.assert_allclose(samples[0].value, divergence(0), rtol=1e-4)
  np.testing.assert_allclose(2 * s @ gradient, slope, rtol=1e-4)
  np.testing.assert_allclose(2 * s @ exact @ s, curve, rtol=1e-3)


def reference():
  return networks_for_test.fitness().reference.astype(np.float64)


def _check_mean(samples, exact):
  """Five standard errors; the samples must vary."""
  error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
  assert (error > 0).mean() > 0.9
  assert (np.abs(samples.mean(axis=0) - exact) <= 5 * error + 1e-4 * np.abs(exact).max()).all()
  # The matrix is known well enough for that to mean something.
  assert np.sqrt(np.square(error).sum() / np.square(exact).sum()) < 0.2


def test_probes_have_the_covariance_they_claim():
  z = np.array([0.5, -1.0, 2.0, 0.0])
  many = jnp.broadcast_to(jnp.asarray(z, jnp.float32), (200_000, 4))
  p = np.exp(z) / np.exp(z).sum()
  for draw, covariance in (
    (module.rademacher, np.eye(4)),
    (module.fisher, (np.diag(p) - np.outer(p, p)) / 2),
  ):
    v = np.asarray(draw(jax.random.key(1), many), np.float64)
    np.testing.assert_allclose(v.T @ v / len(v), covariance, atol=0.006)
    np.testing.assert_allclose(v.mean(axis=0), 0, atol=0.006)
  assert set(np.unique(module.rademacher(jax.random.key(0), many[:9]))) == {-1.0, 1.0}


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_squares_are_those_of_each_example(probes):
  effects = np.random.default_rng(0).normal(size=(6, probes, 7)).astype(np.float32)
  expected = sum(np.square(e.T @ e) for e in effects.astype(np.float64))
  np.testing.assert_allclose(module._squares(effects), expected, rtol=1e-4)


def test_budget_lowers_the_block():
  free, least = influence(), influence(block=1)
  assert least.bytes < free.bytes
  m, fitness = made(), networks_for_test.fitness()
  ties = Ties(m.space, m.scores, 100)
  middle = (least.bytes + free.bytes) / 2
  lowered = Influence(fitness, ties, probes=5, block=16, memory=middle / 2**30)
  assert 1 < lowered.block < 16
  assert lowered.bytes <= middle
  needed = f"{least.bytes / 2**30:.3g}"
  with pytest.raises(ValueError, match=f"memory: 1e-06 GiB is too little; .* takes {needed} GiB"):
    Influence(fitness, ties, probes=5, block=1, memory=1e-6)


def test_refuses_no_probe():
  with pytest.raises(ValueError, match="probes: 0; at least 1"):
    Influence(types.SimpleNamespace(), None, probes=0)
