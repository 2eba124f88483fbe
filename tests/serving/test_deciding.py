"""A decision: the controller's ratio, unless the first deadline needs a higher one."""

import numpy as np
import pytest

from flexiq_jax import serving
from flexiq_jax.serving.controllers import Seen
from flexiq_jax.serving.deciding import Policy, Queue, decide

PROFILE = serving.modelled(int8=100, gain=2.0, fixed=0.0, sizes=(1, 2, 4))
SECONDS = dict(zip(PROFILE.ratios, PROFILE.p50[0], strict=True))


def policy(name, **options):
  controller = serving.create(name, PROFILE, target=10.0, **options)
  return Policy(profile=PROFILE, batching=serving.Batching(size=4), controller=controller)


def decided(of, deadlines, ratios=None):
  queue = Queue(np.zeros(2), np.ones(2, int), deadlines)
  return decide(of, of.controller.start(), Seen(5.0, 2, 2, 0.0), queue)


@pytest.mark.parametrize("ratio", PROFILE.ratios)
def test_the_first_level_that_is_in_time(ratio):
  found = decided(policy("load"), np.array([5.0 + SECONDS[ratio] + 1e-9, np.inf]))
  assert found.ratio == ratio
  assert found.plan.take == 1  # of two, the first would be late


def test_without_need_the_ratio_is_the_controllers():
  assert decided(policy("load"), None).ratio == 0
  assert decided(policy("load"), np.array([np.inf, 5.0])).ratio == 0  # the first one's counts
  assert decided(policy("load"), np.array([6.0, 6.0])).plan.take == 2
  fixed = policy("fixed", ratio=0.5)
  assert decided(fixed, np.array([5.0, 5.0])).ratio == 0.5  # it has no other level


def test_fastest_is_the_best_of_the_levels():
  of = policy("load")
  np.testing.assert_array_equal(of.fastest, of.seconds[1.0])
  assert list(of.seconds) == list(PROFILE.ratios)
