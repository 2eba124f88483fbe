"""Result rows: what is measured on what, and what is left alone."""

import numpy as np
import pytest

from configs import common
from experiments.shared import setup
from experiments.shared.rows import Rows
from flexiq_jax.runs.workdir import Workdir


@pytest.fixture(scope="module")
def config():
  made = common.defaults("test", "resnet8")
  made.weights = "random"
  made.data.name = made.calibration.name = "digits"
  made.data.limit = 30
  made.batch_size = 20
  return made.lock()


@pytest.fixture(scope="module")
def inputs(config):
  return setup.prepare(config)


def answers(inputs, right):
  """A model that knows the labels of the first images and takes the rest for the class above."""
  labels = inputs.evaluation.labels[:30]
  told = np.where(np.arange(30) < right, labels, (labels + 1) % 10)
  seen = iter([told[:20], np.concatenate([told[20:], np.zeros(10, int)])])
  return lambda x: np.eye(10)[next(seen)]


def test_drops_are_against_float_and_int8(inputs, tmp_path):
  rows = Rows(inputs, Workdir(tmp_path))
  rows.add("float", None, 0, answers(inputs, 27), avg_bits=32.0)
  rows.add("uniform_int8", None, 0, answers(inputs, 24), avg_bits=8.0)
  rows.add("flexiq_greedy", 0.5, 0, answers(inputs, 15), avg_bits=6.0, mac_share=0.5)
  table = {r["method"]: r for r in Workdir(tmp_path).rows()}
  names = ("top1", "drop_float", "drop_int8", "avg_bits", "mac_share", "images")
  assert [table["float"][n] for n in names] == [90, 0, None, 32, None, 30]
  assert [table["uniform_int8"][n] for n in names] == [80, 10, 0, 8, None, 30]
  assert [table["flexiq_greedy"][n] for n in names] == [50, 40, 30, 6, 0.5, 30]


def test_row_that_is_there_is_not_computed_again(inputs, tmp_path):
  rows = Rows(inputs, Workdir(tmp_path))
  rows.add("float", None, 0, answers(inputs, 30))

  def predict(x):
    pytest.fail("computed again")

  rows.add("float", None, 0, predict)
  Rows(inputs, Workdir(tmp_path)).add("float", None, 0, predict)
  rows.add("float", None, 1, answers(inputs, 15))  # another seed is another row
  assert [r["top1"] for r in Workdir(tmp_path).rows()] == [100, 50]


def test_broken_model_is_told_with_its_method(inputs, tmp_path):
  rows = Rows(inputs, Workdir(tmp_path))
  with pytest.raises(ValueError, match=r"^flexiq_greedy at 50 %: predict: logits are not finite"):
    rows.add("flexiq_greedy", 0.5, 0, lambda x: np.full((20, 10), np.nan))
  assert Workdir(tmp_path).rows() == []
