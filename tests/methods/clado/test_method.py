"""CLADO as a method: blocks of a network, and what is measured where layers may stay float."""

import numpy as np
import pytest

from flexiq_jax.methods.clado import CladoDiagonal
from flexiq_jax.methods.clado.method import blocks_of, has_pairs
from flexiq_jax.methods.layerwise import FLOAT, Layerwise
from tests.methods.starts_for_test import FLOAT8, MAIN, NAMES, SIZE, made, resnet18_start, start_of


def test_blocks_end_with_additions(tmp_path):
  assert blocks_of(resnet18_start(tmp_path)) == {
    "layer1/0/conv1": 0,
    "layer1/0/conv2": 0,
    "layer2/0/conv1": 1,
    "layer2/0/conv2": 1,
    "layer2/0/downsample/0": 1,
  }


def test_pairs_are_measured_without_floating_point():
  assert [has_pairs(task) for task in (MAIN, SIZE, FLOAT8)] == [True, True, False]


def test_the_diagonal_is_the_divergence_of_single_layers(tmp_path):
  """With floating point, whatever the loss of pairs is."""
  start = start_of(FLOAT8, tmp_path)
  method = made(CladoDiagonal, start, loss="cross_entropy")
  model = Layerwise(start.network.apply, start.network.params, start.stacks)
  plain = dict.fromkeys(model.stacks.names, FLOAT)
  log_p = log_softmax(model.simulated(plain, start.x))
  for name, found in zip(NAMES, method.objective[::2], strict=True):
    log_q = log_softmax(model.simulated({**plain, name: 8}, start.x))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    assert found == pytest.approx(expected, rel=1e-2)
  # One pass for the model, one for what all layers share, and what follows each layer.
  assert 2 < method.took()["forwards"] < 2 + len(NAMES)
  assert not start.workdir.events("unconstrained")


def log_softmax(z):
  z = np.asarray(z, np.float64)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))
