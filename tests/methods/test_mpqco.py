"""MPQCO's metric against Jacobians."""

import jax
import numpy as np
import pytest

from flexiq_jax.methods import mpqco
from tests.methods import models_for_test as models
from tests.methods.models_for_test import errors_of, run_with

BITS = (2, 4)
NAMES = ("conv", "head")


@pytest.mark.parametrize("block", [16, 5])
def test_relative_logits_are_those_of_the_jacobian(block):
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  found = mpqco.relative_logits(made.network, stacks, made.examples, NAMES, block=block)
  rows = np.arange(len(made.images))
  z = np.asarray(made.network.float(made.images), np.float64)[rows, made.labels]
  expected = []
  for name in NAMES:
    jacobian = jax.jit(jax.jacrev(lambda w, name=name: run_with({name: w}, made.images)))
    slopes = np.asarray(jacobian(made.network.weights[name]), np.float64)[rows, made.labels]
    for error in errors_of(name, BITS):
      dz = (slopes * error).reshape(len(rows), -1).sum(axis=1)
      expected.append(np.square(dz / z).mean() / 2)
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_logits_of_zero_are_refused():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  apply = lambda params, x: made.network.apply(params, x) * 0.0
  with pytest.raises(ValueError, match="logit of a label is 0"):
    mpqco.relative_logits(models.changed(apply=apply), stacks, made.examples, ("head",))
