"""RobustQuant: kurtosis, its penalty, and a training that a kill does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.methods import METHODS, robustquant
from flexiq_jax.methods.robustquant import RobustQuant, RobustQuantSettings, kurtosis, penalty
from tests.methods import normed_for_test as normed
from tests.methods.normed_for_test import Killed, compiled
from tests.methods.starts_for_test import MAIN, Batches

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")

SHORT = {"steps": 24, "batch_size": 16, "every": 6, "learning_rate": 0.01}


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
  slope = jax.jit(jax.grad(lambda w: penalty([w], 1.8)))(weights[1])
  assert abs(float(jnp.vdot(slope, weights[1]))) < 1e-4
  assert float(jnp.abs(slope).max()) > 0


def test_gradients_reach_what_is_trained(tmp_path):
  start = normed.start(tmp_path)
  params, affine, running = robustquant.initial(start, normed.NORMED)
  loss = robustquant.objective(start.network, normed.NORMED, RobustQuantSettings())
  batch = (start.x, start.examples.labels)

  @jax.jit
  def slopes(trained):
    of = lambda part: lambda t: part(*loss(t, running, jax.random.key(0), batch))
    whole, penalty = of(lambda value, rest: value), of(lambda _, rest: rest[1]["penalty"])
    return jax.grad(whole)(trained), jax.grad(penalty)(trained)

  whole, penalty = (
    jax.tree.map(lambda a: float(jnp.abs(a).max()), slope)
    for slope in slopes({"params": params, "affine": affine})
  )
  assert min(jax.tree.leaves(whole)) > 0
  # The penalty knows weights alone, of all layers.
  names = ("stem", "first", "second", "head")
  assert min(penalty["params"][name]["kernel"] for name in names) > 1e-4
  assert max(penalty["params"][name]["bias"] for name in names) == 0
  assert max(jax.tree.leaves(penalty["affine"])) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
  del compiled
  return made(tmp_path_factory.mktemp("whole"))


def test_training_lowers_the_kurtosis(whole):
  answer = whole.at(4.0)
  log = whole.start.workdir.events("trained")
  assert [e["step"] for e in log] == [6, 12, 18, 24]
  assert log[-1]["penalty"] < log[0]["penalty"]
  expected = log[0]["cross_entropy"] + log[0]["penalty"]
  assert log[0]["loss"] == pytest.approx(expected, rel=1e-4)
  assert (answer.avg_bits, answer.columns["steps"]) == (4.0, 24)
  assert answer.predict(whole.start.x).shape == (normed.IMAGES, normed.CLASSES)
  # The layers at the budget, the others at 8 bits, from one training.
  model = whole.tuned.uniform(4, keep8=whole.start.kept)
  assert {name: q.bits for name, q in model.items()} == {
    "stem": 8,
    "first": 4,
    "second": 4,
    "head": 8,
  }
  took = whole.took()
  assert took["forwards"] == 3 * 24 * 16 / normed.IMAGES
  whole.at(6.0)
  assert whole.took() == took


def test_a_killed_training_ends_the_same(whole, tmp_path):
  batches = Batches(normed.images(), whole.start.examples.labels, 16)
  killed = made(tmp_path, {"training": lambda size: Killed(batches, 15)})
  with pytest.raises(KeyboardInterrupt):
    killed.at(4.0)
  again = made(tmp_path)
  expected, found = (np.asarray(m.at(4.0).predict(m.start.x)) for m in (whole, again))
  np.testing.assert_array_equal(found, expected)
  events = again.start.workdir.events("trained")
  assert [e["step"] for e in events] == [6, 12, 18, 24]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"learning_rate": 0.0}, "learning_rate is 0.0; a number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; a number above 0"),
    ({"steps": 0}, "steps is 0; an integer from 1"),
    ({"steps": 7}, r"steps is 7; a multiple of every \(6\)"),
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


def test_tasks():
  assert RobustQuant.fits(MAIN)
  assert METHODS["robustquant"] is RobustQuant
