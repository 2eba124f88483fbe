"""RobustQuant: kurtosis, its penalty, and a training that a kill does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.methods import METHODS, robustquant
from flexiq_jax.methods.robustquant import RobustQuant, RobustQuantSettings, kurtosis, penalty
from flexiq_jax.training import loop
from tests.methods import normed_for_test as normed
from tests.methods.normed_for_test import Killed, compiled
from tests.methods.starts_for_test import MAIN, Batches

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")

SHORT = {"steps": 8, "batch_size": 16, "every": 2, "learning_rate": 0.01}


def made(folder, changes=None, **settings):
  start = normed.start(folder, **(changes or {}))
  return RobustQuant(start, RobustQuantSettings(**(SHORT | settings)))


def test_kurtosis_of_distributions():
  rng = np.random.default_rng(0)
  assert kurtosis(jnp.asarray(rng.uniform(2, 5, 10**6))) == pytest.approx(1.8, abs=0.01)
  assert kurtosis(jnp.asarray(rng.normal(1, 3, 10**6))) == pytest.approx(3, abs=0.03)
  assert kurtosis(jnp.asarray([[-1.0, 1.0], [1.0, -1.0]])) == 1  # the least there is
  w = rng.standard_t(5, size=(3, 3, 4, 5))
  z = (w - w.mean()) / w.std()
  assert kurtosis(jnp.asarray(w, jnp.float32)) == pytest.approx((z**4).mean(), rel=1e-4)


def test_penalty_is_a_mean_over_layers():
  rng = np.random.default_rng(0)
  weights = [jnp.asarray(rng.normal(size=n), jnp.float32) for n in (10, 100, 1000)]
  each = [(float(kurtosis(w)) - 1.8) ** 2 for w in weights]
  assert penalty(weights, 1.8) == pytest.approx(np.mean(each), rel=1e-4)
  # Whatever the scale is, so no gradient goes along the weights.
  slope = jax.grad(lambda w: penalty([w], 1.8))(weights[1])
  assert abs(float(jnp.vdot(slope, weights[1]))) < 1e-4
  assert float(jnp.abs(slope).max()) > 0


def test_gradients_reach_what_is_trained(tmp_path):
  start = normed.start(tmp_path)
  params, affine, running = robustquant.initial(start, normed.NORMED)
  trained = {"params": params, "affine": affine}
  batch = (start.x, np.asarray(start.examples.labels))

  def of(weight):
    settings = RobustQuantSettings(penalty=weight)
    loss = robustquant.objective(start.network, normed.NORMED, settings)
    return jax.jit(jax.grad(lambda t: loss(t, running, jax.random.key(0), batch)[0]))(trained)

  without, with_penalty = of(0.0), of(1.0)
  touched = jax.tree.map(lambda a: float(jnp.abs(a).max()) > 0, with_penalty)
  assert all(jax.tree.leaves(touched))
  # The penalty knows weights alone.
  apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), without, with_penalty)
  names = ("stem", "first", "second", "head")
  assert all(apart["params"][name]["kernel"] > 1e-4 for name in names)
  assert max(jax.tree.leaves(apart["affine"])) < 1e-6
  assert all(apart["params"][name]["bias"] < 1e-6 for name in names)


def test_training_lowers_the_kurtosis(tmp_path):
  method = made(tmp_path, steps=40, every=20)
  answer = method.at(4.0)
  log = method.start.workdir.events("trained")
  assert [e["step"] for e in log] == [20, 40]
  assert log[1]["penalty"] < log[0]["penalty"]
  expected = log[0]["cross_entropy"] + log[0]["penalty"]
  assert log[0]["loss"] == pytest.approx(expected, rel=1e-4)
  assert (answer.avg_bits, answer.columns["steps"]) == (4.0, 40)
  assert answer.predict(method.start.x).shape == (normed.IMAGES, normed.CLASSES)
  # The layers at the budget, the others at 8 bits, from one training.
  model = method.start.once("robustquant", lambda: None).uniform(4, keep8=("stem", "head"))
  assert {name: q.bits for name, q in model.items()} == {
    "stem": 8,
    "first": 4,
    "second": 4,
    "head": 8,
  }
  took = method.took()
  assert took["forwards"] == 3 * 40 * 16 / normed.IMAGES
  method.at(6.0)
  assert method.took() == took


def test_a_killed_training_ends_the_same(tmp_path):
  whole = made(tmp_path / "whole")
  x, labels = normed.images(), whole.start.examples.labels
  batches = Batches(x, labels, 16)
  killed = made(tmp_path / "killed", {"training": lambda size: Killed(batches, 5)})
  with pytest.raises(KeyboardInterrupt):
    killed.at(4.0)
  again = made(tmp_path / "killed")
  expected, found = (np.asarray(m.at(4.0).predict(x)) for m in (whole, again))
  np.testing.assert_array_equal(found, expected)
  events = again.start.workdir.events("trained")
  assert [e["step"] for e in events] == [2, 4, 6, 8]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate is 0.0; a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; a number above 0"),
    ({"steps": 0}, "steps is 0; an integer from 1"),
    ({"steps": 7, "every": 2}, r"steps is 7; a multiple of every \(2\)"),
    ({"batch_size": True}, "batch_size is True; an integer from 1"),
    ({"penalty": -1.0}, "penalty is -1.0; a number from 0"),
    ({"momentum": 1.0}, "momentum is 1.0; 0 up to, but not, 1"),
    ({"kurtosis": 0}, "kurtosis is 0; a number above 0"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    RobustQuantSettings(**(SHORT | settings))


@pytest.mark.parametrize("name", ["robustquant", "anyprecision"])
@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (0, True, "batch_size: 16, but there are fewer training images"),
    (9, True, "batch_size: 16, but there are fewer training images"),
    (20, False, "training: the images have no labels, with which"),
  ],
)
def test_images_that_do_not_do(tmp_path, name, images, labels, message):
  x = normed.images()[:images]
  given = np.zeros(images, np.int32) if labels else None
  start = normed.start(tmp_path, training=lambda size: Batches(x, given, size))
  method = METHODS[name](start, METHODS[name].Settings(**SHORT))
  with pytest.raises(ValueError, match=f"^{message}"):
    method.at(8.0)


def test_a_loss_that_is_not_finite_stops(tmp_path):
  with pytest.raises(loop.DivergedError, match="diverged"):
    made(tmp_path, learning_rate=1e30).at(4.0)


def test_tasks():
  assert RobustQuant.fits(MAIN)
  assert METHODS["robustquant"] is RobustQuant
