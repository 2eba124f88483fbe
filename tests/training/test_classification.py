"""Training: exact resume, what is trained and what is not, refusals, and a real run that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import data
from flexiq_jax.training import classification
from flexiq_jax.training.settings import TrainSettings

_PREPROCESS = data.Preprocess(mean=(0.3,), std=(0.4,))
_SETTINGS = TrainSettings(
  epochs=4, batch_size=16, learning_rate=0.1, warmup=1.0, augmentation="shift", held_out=0.2
)
# ResNet-8 on scikit-learn's digits, 5 to 15 seconds on two CPU cores. Measured with
# models.create("resnet8"), seeds 0 and 1: 99.3 % of the 445 test digits.
_DIGITS = TrainSettings(
  epochs=20,
  batch_size=64,
  learning_rate=0.1,
  warmup=2.0,
  weight_decay=5e-4,
  augmentation="shift",
)


class _Net(nnx.Module):
  """Everything a training step has to carry: parameters, batch statistics and dropout keys."""

  def __init__(self, *, classes=3, seed=0):
    rngs = nnx.Rngs(seed)
    self.conv = nnx.Conv(1, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(4, classes, rngs=rngs)

  def __call__(self, x):
    x = jnp.mean(jax.nn.relu(self.norm(self.conv(x))), axis=(1, 2))
    return self.head(self.dropout(x))


@pytest.fixture(scope="module")
def source():
  """Three classes that differ in where an image is bright."""
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  images = rng.integers(0, 60, (60, 8, 8, 1), dtype=np.uint8)
  for image, label in zip(images, labels, strict=True):
    if label:
      image[:, ::2] += 120
    if label == 2:
      image[::2] += 60
  return data.ArraySource(images, labels, name="toy", split="train", identity=("toy",))


@pytest.fixture(scope="module")
def uninterrupted(source):
  net = _Net()
  return classification.fit(net, source, _PREPROCESS, settings=_SETTINGS)


def _leaves(module):
  """All state as bytes: equal is equal bit for bit."""
  named = jax.tree_util.tree_leaves_with_path(nnx.state(module))
  out = {}
  for path, leaf in named:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    out[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
  return out


class _Killed(Exception):
  pass


def _kill_after(epoch):
  def progress(entry):
    if entry.epoch == epoch:
      raise _Killed

  return progress


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(source, uninterrupted, tmp_path):
  whole, whole_log = uninterrupted
  # Epoch 3 is lost with the second kill, since only even epochs are saved, and is done again.
  settings = dataclasses.replace(_SETTINGS, checkpoint_every=2)
  for killed_after in (2, 3):
    with pytest.raises(_Killed):
      classification.fit(
        _Net(),
        source,
        _PREPROCESS,
        settings=settings,
        checkpoint_dir=tmp_path,
        progress=_kill_after(killed_after),
      )
  epochs = []
  other = _Net(seed=1)  # a resumed run takes nothing from the module it is given
  module, log = classification.fit(
    other,
    source,
    _PREPROCESS,
    settings=settings,
    checkpoint_dir=tmp_path,
    progress=lambda entry: epochs.append(entry.epoch),
  )
  assert module is other and epochs == [3, 4] and log == whole_log
  assert _leaves(module) == _leaves(whole)


def test_a_finished_run_is_not_repeated(source, uninterrupted, tmp_path):
  classification.fit(_Net(), source, _PREPROCESS, settings=_SETTINGS, checkpoint_dir=tmp_path)
  module, log = classification.fit(
    _Net(seed=1),
    source,
    _PREPROCESS,
    settings=_SETTINGS,
    checkpoint_dir=tmp_path,
    progress=_kill_after(4),
  )
  assert log == uninterrupted[1] and _leaves(module) == _leaves(uninterrupted[0])


def test_streaming_gives_the_same_bits_as_memory(source, uninterrupted):
  module, log = classification.fit(_Net(), source, _PREPROCESS, settings=_SETTINGS, memory_budget=0)
  assert log == uninterrupted[1] and _leaves(module) == _leaves(uninterrupted[0])


def test_the_run_depends_on_the_seed(source, uninterrupted):
  settings = dataclasses.replace(_SETTINGS, seed=1, epochs=2)
  _, log = classification.fit(_Net(), source, _PREPROCESS, settings=settings)
  assert log[0].loss != uninterrupted[1][0].loss


def test_training_moves_parameters_and_statistics_and_ends_in_evaluation_mode(uninterrupted):
  module, log = uninterrupted
  before, after = _leaves(_Net()), _leaves(module)
  assert all(before[name] != after[name] for name in before if not name.endswith("['key'].value"))
  assert [entry.epoch for entry in log] == [1, 2, 3, 4]
  assert [entry.step for entry in log] == [3, 6, 9, 12]  # 48 images to train on, 16 a step
  assert log[-1].loss < log[0].loss
  assert log[-1].learning_rate < 0.1 * log[0].learning_rate == pytest.approx(0.01)
  assert all(0 <= entry.held_out_top1 <= 100 for entry in log)
  x = jnp.ones((2, 8, 8, 1))
  np.testing.assert_array_equal(module(x), module(x))  # no dropout, no batch statistics


def test_top1_counts_every_example_once_and_leaves_the_module(source):
  net = _Net()
  before = _leaves(net)
  evaluated = nnx.clone(net)
  evaluated.eval()
  batch = next(data.batches(source, _PREPROCESS, 60))
  logits = np.asarray(evaluated(batch.images))
  want = 100 * np.mean(logits.argmax(-1) == source.labels)
  assert classification.top1(net, source, _PREPROCESS) == pytest.approx(want)
  some = np.array([3, 7, 11])
  want = 100 * np.mean(logits[some].argmax(-1) == source.labels[some])
  assert classification.top1(net, source, _PREPROCESS, some) == pytest.approx(want)
  assert _leaves(net) == before and not net.norm.use_running_average


def test_held_out_slice_is_balanced_disjoint_and_complete(source):
  kept, held_out = classification.split_held_out(source, _SETTINGS)
  assert len(held_out) == 12 and np.bincount(source.labels[held_out]).tolist() == [4, 4, 4]
  assert sorted([*kept, *held_out]) == list(range(60))
  kept, held_out = classification.split_held_out(
    source, dataclasses.replace(_SETTINGS, held_out=0.0)
  )
  assert len(kept) == 60 and not held_out.size


def test_without_a_held_out_slice_nothing_is_evaluated(source):
  settings = dataclasses.replace(_SETTINGS, epochs=2, held_out=0.0, optimizer="adamw")
  _, log = classification.fit(_Net(), source, _PREPROCESS, settings=settings)
  assert [entry.held_out_top1 for entry in log] == [None, None]


@pytest.mark.parametrize(
  ("change", "preprocess", "message"),
  [
    ({"learning_rate": 0.2}, _PREPROCESS, "learning_rate = 0.1; this one has 0.2"),
    ({"epochs": 5}, _PREPROCESS, "epochs = 4; this one has 5"),
    ({}, data.Preprocess(mean=(0.2,), std=(0.4,)), r"preprocess.mean = \[0.3\]; this one has \[0."),
  ],
)
def test_a_checkpoint_of_another_run_is_refused(source, tmp_path, change, preprocess, message):
  with pytest.raises(_Killed):
    classification.fit(
      _Net(),
      source,
      _PREPROCESS,
      settings=_SETTINGS,
      checkpoint_dir=tmp_path,
      progress=_kill_after(1),
    )
  settings = dataclasses.replace(_SETTINGS, **change)
  with pytest.raises(ValueError, match=message):
    classification.fit(_Net(), source, preprocess, settings=settings, checkpoint_dir=tmp_path)


def test_a_run_that_cannot_work_is_refused(source):
  with pytest.raises(ValueError, match=r"batch_size is 49, but toy .* has only 48 images"):
    settings = dataclasses.replace(_SETTINGS, batch_size=49)
    classification.fit(_Net(), source, _PREPROCESS, settings=settings)
  with pytest.raises(ValueError, match=r"to \[2, 2\]; logits \[2, K\] with K from 3"):
    classification.fit(_Net(classes=2), source, _PREPROCESS, settings=_SETTINGS)
  with pytest.raises(ValueError, match=r"loss is (nan|inf) in epoch 1: training diverged"):
    settings = dataclasses.replace(_SETTINGS, learning_rate=1e38)
    classification.fit(_Net(), source, _PREPROCESS, settings=settings)


def test_digits_recipe_learns_the_digits_in_four_epochs():
  # A short run on the real demo data with a small net; chance is 10 %.
  class Small(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
      self.norm = nnx.BatchNorm(16, rngs=rngs)
      self.head = nnx.Linear(16 * 16, 10, rngs=rngs)

    def __call__(self, x):
      x = nnx.max_pool(jax.nn.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
      return self.head(x.reshape(len(x), -1))

  settings = dataclasses.replace(_DIGITS, epochs=4, augmentation="none")
  digits = data.open_source("digits")
  module, log = classification.fit(Small(nnx.Rngs(0)), digits, _PREPROCESS, settings=settings)
  assert log[-1].held_out_top1 > 90
  assert classification.top1(module, data.open_source("digits", "test"), _PREPROCESS) > 90


@pytest.mark.slow
def test_digits_recipe_reaches_its_accuracy():
  from flexiq_jax import models

  spec = models.get("resnet8")
  preprocess = data.Preprocess(crop=spec.crop, mean=spec.mean, std=spec.std)
  module, _ = classification.fit(
    models.create("resnet8"), data.open_source("digits"), preprocess, settings=_DIGITS
  )
  assert classification.top1(module, data.open_source("digits", "test"), preprocess) > 98
