"""Batches of any size and ratios that change: what is compiled, and what comes out."""

import threading

import numpy as np
import pytest

from flexiq_jax import deployment
from flexiq_jax.deployment import runner as runners
from flexiq_jax.kernels import tile_files, tuning
from flexiq_jax.kernels.tile_files import Shape
from tests.deployment.deployed_for_test import LEVELS, RESNET, made


@pytest.fixture(scope="module")
def small():
  return made(RESNET)


@pytest.fixture(scope="module")
def deployed(small):
  return deployment.deploy(small.model, small.x[:1], levels=LEVELS)


def test_neither_ratios_nor_batch_sizes_compile(small, deployed):
  runner = deployment.Runner(deployed, sizes=(2, 4))
  assert runner.ratio == 0.0
  first = np.asarray(runner(small.x[:4]))
  assert runner.traces == 1
  runner(small.x[:1])
  assert runner.traces == 2
  for ratio in (1.0, 0.4, 0.3, 0.0):
    runner.switch(ratio)
    for n in (1, 2, 3, 4, 6):
      logits = np.asarray(runner(small.x[:n]))
      assert logits.shape == (n, 10)
      np.testing.assert_allclose(
        logits, small(small.x, runner.ratio)[:n], atol=1e-4 * np.std(first)
      )
  assert runner.traces == 2
  np.testing.assert_array_equal(runner(small.x[:4]), first)


def test_ratios_go_to_the_level_that_reaches_them(deployed):
  runner = deployment.Runner(deployed)
  for ratio, level in ((0.0, 0), (0.01, 1), (0.3, 1), (0.31, 2), (0.5, 2), (0.9, 3), (1, 3)):
    runner.switch(ratio)
    assert runner.ratio == np.float32(LEVELS[level])
    assert int(deployed.level(ratio)) == level
  runner.wait()
  for wrong in (-0.1, 1.1, float("nan"), "0.5", None):
    with pytest.raises(ValueError, match=rf"ratio: {wrong!r}; a number in 0..1 is accepted"):
      runner.switch(wrong)
  assert runner.ratio == 1.0


def test_a_batch_in_parts_is_at_one_level(small, deployed):
  """Another thread switches between the parts; here, a run that does so itself."""
  runner = deployment.Runner(deployed, sizes=(2,))
  whole, levels = runner._run, []

  def switching(deployed, x, level):
    levels.append(int(level))
    runner.switch(LEVELS[len(levels) % len(LEVELS)])
    return whole(deployed, x, level)

  runner._run = switching
  runner(small.x[:6])
  assert levels == [0, 0, 0]
  runner(small.x[:6])
  assert levels[3:] == [3, 3, 3]


def test_number_and_level_of_a_switch_belong_together(deployed):
  runner = deployment.Runner(deployed)

  def switch(ratios):
    for _ in range(300):
      for ratio in ratios:
        runner.switch(ratio)

  threads = [threading.Thread(target=switch, args=(r,)) for r in ((0.0, 0.5), (1.0, 0.3))]
  for thread in threads:
    thread.start()
  while any(thread.is_alive() for thread in threads):
    number, level = runner._present
    assert int(level) == number
  for thread in threads:
    thread.join()


def test_empty_batches_and_lists(small, deployed):
  runner = deployment.Runner(deployed, sizes=(2,))
  assert runner(small.x[:0]).shape == (0, 10)
  np.testing.assert_array_equal(runner(small.x[:2].tolist()), runner(small.x[:2]))
  # An example that is not finite spoils no other.
  spoilt = np.where(np.arange(2)[:, None, None, None] == 0, np.nan, small.x[:2]).astype(np.float32)
  np.testing.assert_array_equal(runner(spoilt)[1], runner(small.x[:2])[1])


def test_measured_tiles_come_from_a_folder(small, deployed, tmp_path, monkeypatch):
  kind, shape = "TPU v5 lite", Shape(m=4, k=256, n=128, block=128)
  tuned = tuning.autotune([shape], tmp_path, kind=kind, seconds=lambda *_: 1.0)
  with pytest.raises(ValueError, match=r"device 'cpu' runs the reference, which has no tiles"):
    deployment.Runner(deployed, tuning=tmp_path)
  monkeypatch.setattr(tile_files, "present", lambda: kind)
  seen = []

  def spy(deployed, x, level, *, tuned, **kernel):
    seen.append(tuned)
    return deployment.apply(deployed, x, level, **kernel)

  monkeypatch.setattr(runners, "apply", spy)
  deployment.Runner(deployed, sizes=(2,), tuning=tmp_path)(small.x[:2])
  deployment.Runner(deployed, sizes=(2,))(small.x[:2])
  deployment.Runner(deployed, sizes=(2,), tuning="rule")(small.x[:2])
  assert seen == [{shape: tuned[shape].tiles}, {}, {}]
  monkeypatch.setattr(tile_files, "SHIPPED", tmp_path)
  for tuning_of in (None, "rule"):
    deployment.Runner(deployed, sizes=(2,), tuning=tuning_of)(small.x[:2])
  assert seen[3:] == [{shape: tuned[shape].tiles}, {}]


def test_refusals(small, deployed):
  with pytest.raises(ValueError, match=r"sizes: \(0,\); positive"):
    deployment.Runner(deployed, sizes=(0,))
  with pytest.raises(ValueError, match=r"a batch of 9; 1..8"):
    deployment.bucket(9, (1, 8))
  assert [deployment.bucket(n, (8, 1, 4)) for n in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
  for levels in ((), (0.5, 0.25), (0.5, 0.5), (0.0, 1.5)):
    with pytest.raises(ValueError, match=r"levels: .*ascending"):
      deployment.deploy(small.model, small.x[:1], levels=levels)
