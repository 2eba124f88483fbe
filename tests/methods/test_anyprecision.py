"""Any-precision networks: DoReFa's codes, dropped bits, teachers, and a norm for each width."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.calibrated import calibrate
from flexiq_jax.methods import anyprecision, dorefa
from flexiq_jax.methods.anyprecision import AnyPrecision, AnyPrecisionSettings, Model
from flexiq_jax.methods.examples import cross_entropy
from flexiq_jax.network import Network
from tests.methods import normed_for_test as normed
from tests.methods.normed_for_test import compiled

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")

SHORT = {"steps": 4, "batch_size": 16, "every": 2, "learning_rate": 1e-3}
BITS = (4, 6, 8)
SHAPES = {"w": (3, 5), "head": (5, normed.CLASSES)}


def weights(seed, size=2000):
  return jnp.asarray(np.random.default_rng(seed).standard_t(4, size=size) * 0.3, jnp.float32)


def oracle(w, bits, drop):
  """Codes and values in NumPy."""
  w = np.asarray(w, np.float64)
  u = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
  code = np.rint(u * (2**bits - 1)) if drop == "round" else np.rint(255 * u) // 2 ** (8 - bits)
  return (2 * code / (2**bits - 1) - 1) * np.abs(w).mean()


@pytest.mark.parametrize("drop", dorefa.DROPS)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_quantized_weights(bits, drop):
  w = weights(0)
  found, expected = np.asarray(dorefa.weights(w, bits, drop)), oracle(w, bits, drop)
  step = 2 * float(jnp.abs(w).mean()) / (2**bits - 1)
  # A value on the edge between two codes may fall to either in float32.
  assert (np.abs(found - expected) > 1e-3 * step).mean() < 2e-3
  assert np.abs(found - expected).max() < 1.01 * step
  assert len(np.unique(found.round(5))) <= 2**bits
  assert np.abs(found).max() <= float(jnp.abs(w).mean()) * (1 + 1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 5, 6, 7]))
def test_dropped_bits_of_stored_codes(seed, bits):
  w = weights(seed, 64)
  codes, mean = dorefa.stored(w)
  assert codes.dtype == jnp.uint8
  top = dorefa.dropped(codes, bits)
  # What is stored is all that the truncated form needs, bit for bit.
  expected = np.asarray(dorefa.value(top, bits, mean))
  np.testing.assert_allclose(dorefa.weights(w, bits, "truncate"), expected, rtol=0, atol=1e-6)
  # In two steps as in one.
  np.testing.assert_array_equal(top, dorefa.dropped(codes, 7) >> (7 - bits))
  assert int(top.min()) >= 0 and int(top.max()) < 2**bits


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_truncated_and_rounded_codes_differ(bits):
  u = dorefa.unit(weights(1))
  rounded, cut = dorefa.code(u, bits), dorefa.dropped(dorefa.code(u, 8), bits)
  apart = np.asarray(rounded - cut)
  assert set(np.unique(apart)) == {-1, 0, 1} and 0.05 < (apart != 0).mean() < 0.6
  # Truncation is a floor of 2^k u, rounding one to the nearest of 2^k - 1 steps.
  exact = np.floor(np.asarray(u) * 2**bits)
  assert (np.clip(exact, 0, 2**bits - 1) != cut).mean() < 0.05
  np.testing.assert_array_equal(dorefa.code(u, 8), dorefa.dropped(dorefa.code(u, 8), 8))


def test_gradients_of_weights_are_straight_through():
  w = weights(2, 50)
  mean = float(jnp.abs(w).mean())
  v = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
  smooth = lambda w: jnp.vdot((2 * dorefa.unit(w) - 1) * mean, v)  # E is a constant
  for drop in dorefa.DROPS:
    found = jax.grad(lambda w, drop=drop: jnp.vdot(dorefa.weights(w, 4, drop), v))(w)
    np.testing.assert_allclose(found, jax.grad(smooth)(w), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, compiled):
  del compiled
  start = normed.start(tmp_path_factory.mktemp("parts"))
  model = Model.create(start, BITS, "round")
  return start, model, *model.initial(start)


def test_widths_start_near_the_float_model(parts):
  start, model, trained, running = parts
  z = np.asarray(start.network.float(start.x))
  assert model.normed == normed.NORMED
  run = jax.jit(lambda *given: [model.run(*given, bits, start.x) for bits in BITS])
  errors = [np.square(np.asarray(y) - z).mean() / z.var() for y in run(trained, running)]
  assert errors[2] < errors[1] < errors[0] < 1
  assert errors[2] < 0.02


@pytest.fixture(scope="module")
def step(parts):
  """A step's value, what is carried along after it, and its gradient."""
  start, model, trained, running = parts
  loss = jax.value_and_grad(anyprecision.objective(model), has_aux=True)
  batch = (start.x, start.examples.labels)
  return jax.jit(loss)(trained, running, jax.random.key(0), batch)


def test_teachers_are_constants(parts, step):
  start, model, trained, running = parts
  (value, (_, metrics)), slope = step
  assert value == pytest.approx(sum(float(metrics[f"loss_{b}"]) for b in BITS), rel=1e-5)
  run = lambda trained, bits: model.run(trained, running, bits, start.x, {})

  @jax.jit
  def alone(trained, fixed):
    soft = optax.softmax_cross_entropy
    top = cross_entropy(run(trained, 8), start.examples.labels).mean()
    return top + soft(run(trained, 6), fixed[8]).mean() + soft(run(trained, 4), fixed[6]).mean()

  fixed = jax.jit(lambda trained: {bits: jax.nn.softmax(run(trained, bits)) for bits in (6, 8)})
  expected = jax.jit(jax.grad(alone))(trained, fixed(trained))
  for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  # Each width's norms learn, and all weights.
  for part in (*slope["affine"].values(), slope["params"]):
    assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(part))


def test_running_moments_belong_to_a_width(parts, step):
  _, _, _, running = parts
  (_, (fresh, _)), _ = step
  for bits in ("4", "6", "8"):
    assert fresh[bits].keys() == running[bits].keys()
  # The norm after the head has no batch norm after it.
  for bits in ("4", "6", "8"):
    apart = {
      n: float(jnp.abs(fresh[bits][n].mean - running[bits][n].mean).max()) for n in fresh[bits]
    }
    assert apart["head"] == 0
  apart = jnp.abs(fresh["4"]["second"].mean - fresh["8"]["second"].mean).max()
  assert float(apart) > 1e-4


def test_budgets(tmp_path):
  start = normed.start(tmp_path)
  given = AnyPrecisionSettings(**SHORT)
  method = AnyPrecision(start, given)
  answers = {budget: method.at(budget) for budget in (4.0, 5.0, 8.0)}
  assert {b: a.avg_bits for b, a in answers.items()} == {4.0: 4.0, 5.0: 4.0, 8.0: 8.0}
  four, again, eight = (np.asarray(a.predict(start.x)) for a in answers.values())
  np.testing.assert_array_equal(four, again)
  assert np.abs(four - eight).max() > 1e-3
  assert [e["step"] for e in start.workdir.events("trained")] == [2, 4]
  assert {"loss_4", "loss_6", "loss_8"} <= start.workdir.events("trained")[0].keys()
  with pytest.raises(ValueError, match="the smallest that a width keeps is 4"):
    method.at(3.0)


def test_a_model_without_batch_norm_has_affine_maps(tmp_path):
  apply = lambda p, x: jnp.tanh(x.mean(axis=(1, 2)) @ p["w"]) @ p["head"]
  rng = np.random.default_rng(0)
  params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
  x = normed.images()
  seen = calibrate(Network(apply, params, x[:1]), [x])
  start = normed.start(tmp_path, calibrated=seen, apply=apply, params=params, names=("w",))
  model = Model.create(start, (4, 8), "round")
  trained, running = model.initial(start)
  loss = jax.grad(anyprecision.objective(model), has_aux=True)
  slope, (fresh, _) = jax.jit(loss)(trained, running, jax.random.key(0), (x, start.examples.labels))
  assert model.normed == ()
  jax.tree.map(np.testing.assert_array_equal, fresh, running)
  assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(slope))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"trained_bits": ()}, r"trained_bits is \(\); ascending widths of 2..8"),
    ({"trained_bits": (8, 4)}, r"trained_bits is \(8, 4\)"),
    ({"trained_bits": (1, 4)}, r"trained_bits is \(1, 4\)"),
    ({"drop": "floor"}, "drop: 'floor' is not one of round, truncate"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    AnyPrecisionSettings(**settings)
