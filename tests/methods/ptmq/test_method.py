"""PTMQ from end to end: it is better than nearest rounding, decides, and can be killed."""

import numpy as np
import pytest

from flexiq_jax.methods.ptmq import Ptmq, PtmqSettings, rounding
from flexiq_jax.runs.workdir import Workdir
from tests.methods import normed_for_test as normed
from tests.methods.normed_for_test import compiled

__all__ = ["compiled"]
pytestmark = pytest.mark.usefixtures("compiled")

SHORT = {
  **{"steps": 250, "batch_size": 16, "groups": (3, 4, 8), "weight_bits": (3,)},
  **{"rounding_rate": 3e-2, "regularizer": 2.0},
}


def made(folder, **settings):
  start = normed.start(folder, training=lambda size: pytest.fail("it takes no labels"))
  return Ptmq(start, PtmqSettings(**(SHORT | settings)))


def errors(method, model):
  """Squared distance of the logits from the float model's."""
  network, x = method.start.network, method.start.x
  return np.square(np.asarray(network.uniform(model, x)) - np.asarray(network.float(x))).mean()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
  """A reconstruction at weights of 3 bits."""
  del compiled
  method = made(tmp_path_factory.mktemp("whole"))
  _ = method.model
  return method


def test_it_beats_nearest_rounding(whole):
  nearest = whole.start.calibrated.uniform(3, keep8=whole.start.kept)
  assert errors(whole, whole.model[3]) < 0.7 * errors(whole, nearest)
  # Nearly every rounding has made up its mind; at the start hardly any has.
  grids, network = whole.grids, whole.start.network
  start = {n: rounding.start(own.steps(network.layer(n), 0)) for n, own in grids.items()}
  assert rounding.decided(start) < 0.1
  (event,) = whole.start.workdir.events("trained")
  assert event["decided"] == rounding.decided(whole.trained["v"]) > 0.9
  up = np.asarray(whole.model[3]["first"].w) - np.asarray(nearest["first"].w)
  assert set(np.unique(up)) <= {-1, 0, 1} and (up != 0).any()


def test_budgets(whole):
  answers = {budget: whole.at(budget) for budget in (3.0, 6.0, 8.0)}
  assert {b: a.avg_bits for b, a in answers.items()} == {3.0: 3.0, 6.0: 4.0, 8.0: 8.0}
  assert answers[3.0].columns["steps"] == SHORT["steps"]  # of one block
  assert whole.trained_blocks == {1: ("first", "second")}
  x = whole.start.x
  models = whole.start.network.float, answers[6.0].predict, answers[8.0].predict
  real, four, eight = (np.asarray(predict(x)) for predict in models)
  assert np.square(eight - real).mean() < np.square(four - real).mean()
  with pytest.raises(ValueError, match="the smallest that a width keeps is 3"):
    whole.at(2.0)


def test_a_killed_reconstruction_ends_the_same(whole, tmp_path, monkeypatch):
  event = Workdir.event

  def dies(self, name, **values):
    event(self, name, **values)
    if name == "trained":
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Workdir, "event", dies)
    with pytest.raises(KeyboardInterrupt):
      _ = made(tmp_path).model
  again = made(tmp_path)
  for bits, model in whole.model.items():
    for name, q in model.items():
      np.testing.assert_array_equal(q.w, again.model[bits][name].w)
      np.testing.assert_array_equal(q.x_scale, again.model[bits][name].x_scale)
  assert len(again.start.workdir.events("trained")) == 1  # the block was read back


def test_other_settings_are_another_run(whole):
  other = made(whole.start.workdir.path, regularizer=0.6)
  with pytest.raises(ValueError, match="is of a run with settings"):
    _ = other.model


def test_more_images_than_there_are(tmp_path):
  with pytest.raises(ValueError, match=r"^batch_size: 64; 1..48 is accepted, the calibration"):
    made(tmp_path, batch_size=64).at(4.0)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"steps": 0}, "steps is 0; an integer from 1"),
    ({"rounding_rate": 0.0}, "rounding_rate is 0.0; a number above 0"),
    ({"scale_rate": float("nan")}, "scale_rate is nan; a number above 0"),
    ({"groups": (4, 8), "weight_bits": ()}, r"groups is \(4, 8\); three ascending widths"),
    ({"weight_bits": (5,)}, r"weight_bits is \(5,\); widths of groups"),
    ({"shares": (1.0, 1.0)}, r"shares is \(1.0, 1.0\); three numbers from 0"),
    ({"float_share": 1.5}, "float_share is 1.5; a number in 0..1"),
  ],
)
def test_wrong_settings(settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    PtmqSettings(**(SHORT | settings))
