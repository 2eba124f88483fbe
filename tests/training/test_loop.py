"""The loop with parameters, a loss and data of no model: keys, totals, resume, divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.training import loop


@dataclasses.dataclass
class _Numbers:
  """Two batches of three numbers an epoch; an epoch may be poisoned."""

  poisoned: int = 0
  steps: int = 2

  def epoch(self, epoch):
    for step in range(self.steps):
      x = np.arange(3, dtype=np.float32) + 10 * epoch + step
      yield {"x": x * np.inf if epoch == self.poisoned else x}


def _loss(params, rest, key, batch):
  """Squared distance to the batch; counts its steps, and reports its key and its numbers."""
  loss = jnp.mean((params["w"] - 0.01 * batch["x"]) ** 2)
  metrics = {"sum": jnp.sum(batch["x"]), "draw": jax.random.uniform(key)}
  return loss, ({"count": rest["count"] + 1}, metrics)


def _train(data, epochs=4, **options):
  options = {"run": {"rate": 0.1}, "seed": 5} | options
  return loop.train(
    _loss,
    {"w": jnp.zeros(3)},
    {"count": jnp.int32(0)},
    optax.sgd(0.1, momentum=0.9),
    data,
    epochs=epochs,
    entry=lambda epoch, state: {**dataclasses.asdict(epoch), "w": float(state.params["w"][0])},
    **options,
  )


def test_an_epoch_adds_up_its_steps_and_each_step_has_its_key():
  state, log = _train(_Numbers(), epochs=2)
  assert int(state.rest["count"]) == 4
  assert [entry["step"] for entry in log] == [2, 4]
  assert [entry["totals"]["sum"] for entry in log] == [33 + 36, 63 + 66]
  draw = lambda step: float(jax.random.uniform(jax.random.fold_in(jax.random.key(5), step)))
  want = [draw(0) + draw(1), draw(2) + draw(3)]
  np.testing.assert_allclose([entry["totals"]["draw"] for entry in log], want, rtol=1e-6)
  x = np.arange(10, 13) / 100
  w = 0.1 * 2 / 3 * x  # after the first step
  np.testing.assert_allclose(log[0]["loss"], np.mean([x**2, (w - x - 0.01) ** 2]), rtol=1e-5)


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path):
  whole, log = _train(_Numbers())

  def interrupt(entry):
    if entry["epoch"] == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _train(_Numbers(), checkpoint_dir=tmp_path, checkpoint_every=2, progress=interrupt)
  state, resumed = _train(_Numbers(), checkpoint_dir=tmp_path, checkpoint_every=2)
  assert resumed == log
  jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_diverged_run_keeps_the_last_good_weights(tmp_path):
  good, log = _train(_Numbers(), epochs=2)
  for _ in range(2):  # a second start fails alike
    with pytest.raises(loop.DivergedError, match=r"loss is (nan|inf) in epoch 3"):
      _train(_Numbers(poisoned=3), checkpoint_dir=tmp_path, checkpoint_every=10)
    with Checkpoints(tmp_path) as checkpoints:
      found = checkpoints.restore_latest(good)
    assert found.step == 2 and found.metadata["log"] == log
    jax.tree.map(np.testing.assert_array_equal, found.tree, good)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
  _train(_Numbers(), epochs=1, checkpoint_dir=tmp_path)
  with pytest.raises(ValueError, match=r"of a run with rate = 0\.1; this one has 0\.2"):
    _train(_Numbers(), checkpoint_dir=tmp_path, run={"rate": 0.2})
