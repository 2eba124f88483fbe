"""Another float model as the teacher: whose logits are wanted, and which models are refused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexiq_jax as fq
from flexiq_jax import finetuning
from flexiq_jax.finetuning import FinetuneSettings
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings, selectable

CLASSES, SIDE = 4, 6
# Nothing moves: the loss of a step is that of the model as it began.
STILL = FinetuneSettings(
  **dict.fromkeys(("learning_rate", "other_learning_rate", "scale_learning_rate"), 1e-12),
  steps=1,
  every=1,
  refit=0,
  warmup=0,
  batch_size=32,
  anchors=(1.0,),
  ratios=(1.0,),
  reconstruct=False,
)


def model(width, depth=2, classes=CLASSES, inputs=SIDE, seed=0):
  """A network of dense layers, `(apply, params)`."""
  sizes = (inputs, *[width] * depth, classes)
  keys = jax.random.split(jax.random.key(seed), len(sizes))
  params = {
    f"w{i}": jax.random.normal(keys[i], (a, b)) / a**0.5
    for i, (a, b) in enumerate(itertools.pairwise(sizes))
  }

  def apply(params, x):
    for i in range(len(params)):
      x = jnp.dot(jax.nn.relu(x) if i else x, params[f"w{i}"])
    return x

  return apply, params


def network(*args, **how):
  return Network(*model(*args, **how), jnp.zeros((1, how.get("inputs", SIDE))))


@pytest.fixture(scope="module")
def start():
  x = np.asarray(jax.random.normal(jax.random.key(1), (32, SIDE)))
  student = network(8)
  names = selectable(student.layers, first_last=False)
  settings = LowSettings(group_size=2)
  return fq.quantize(student, x, names=names, settings=settings, progress=False), x


@pytest.fixture(scope="module")
def teacher():
  return network(16, depth=3, seed=5)


def test_the_loss_is_the_distance_from_the_teachers_logits(start, teacher):
  student, x = start
  _, log = finetuning.finetune(student, finetuning.Examples(x), [x], STILL, teacher=teacher)
  wanted = np.square(student(x, 1.0) - teacher.float(x)).sum(axis=1).mean()
  own = np.square(student(x, 1.0) - student.network.float(x)).sum(axis=1).mean()
  assert log[0]["loss_1"] == pytest.approx(float(wanted), rel=1e-4)
  assert wanted > 2 * own  # another loss than without it


def test_distances_are_balanced_by_those_from_the_teacher(start, teacher):
  student, x = start
  settings = dataclasses.replace(STILL, balance=1.0)
  _, log = finetuning.finetune(student, finetuning.Examples(x), [x], settings, teacher=teacher)
  assert log[0]["loss"] == pytest.approx(1.0, rel=0.01)  # as far as it was at every ratio


def test_uniform_models_have_one_too(start, teacher):
  student, x = start
  plain = {k: dataclasses.replace(q, low=None) for k, q in student.model.items()}
  given = (student.network, plain, finetuning.Examples(x), STILL)
  _, log = finetuning.finetune_uniform(*given, teacher=teacher)
  wanted = np.square(student(x, 0.0) - teacher.float(x)).sum(axis=1).mean()
  assert log[0]["loss"] == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("given", ["pair", "network"])
def test_training_comes_nearer_to_it(start, teacher, given, tmp_path):
  student, x = start
  settings = dataclasses.replace(
    *(STILL,), steps=60, every=60, learning_rate=1.0, other_learning_rate=1e-3, anchors=(0.0, 1.0)
  )
  taught = fq.finetune(
    *(student, x),
    settings=settings,
    teacher=teacher if given == "network" else (teacher.apply, teacher.params),
    checkpoint_dir=tmp_path,
    progress=False,
  )
  far = lambda m: float(np.square(m(x, 1.0) - teacher.float(x)).mean())
  assert far(taught) < 0.7 * far(student)
  with pytest.raises(ValueError, match="teacher"):  # the checkpoint is of another run
    fq.finetune(student, x, settings=settings, checkpoint_dir=tmp_path, progress=False)


@pytest.mark.parametrize(
  ("other", "changes", "message"),
  [
    ({"classes": 3}, {}, r"teacher: its logits are \(1, 3\), those of the model \(1, 4\)"),
    ({"inputs": 5}, {}, r"teacher: cannot take the model's inputs, \(1, 6\)"),
    ({"depth": 3}, {"output_weight": 1.0}, "output_weight: 1.0, but the teacher has other layers"),
  ],
)
def test_teachers_that_do_not_fit(start, other, changes, message):
  student, x = start
  settings, teacher = dataclasses.replace(STILL, **changes), network(8, **other)
  with pytest.raises(ValueError, match=message):
    finetuning.finetune(student, finetuning.Examples(x), [x], settings, teacher=teacher)


def test_what_is_no_model_is_refused(start):
  student, x = start
  with pytest.raises(ValueError, match="teacher: net: "):
    fq.finetune(student, x, teacher="resnet56", progress=False)
