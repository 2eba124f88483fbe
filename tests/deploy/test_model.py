"""The deployed model against the mixed rule: integer sums, codes, logits, one executable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import deploy, graph, rules
from flexiq_jax.deploy.layers import Mixed
from flexiq_jax.grouping import LowSettings
from tests.deploy.deployed_for_test import (
  BLOCKS,
  BOTTLENECK,
  LEVELS,
  MOBILE,
  RESNET,
  SWIN,
  VIT,
  exact_scales,
  made,
)

CASES = {"resnet": RESNET, "bottleneck": BOTTLENECK, "vit": VIT, "mobile": MOBILE, "swin": SWIN}
# Without shift blocks, and with groups that do not divide the channels.
PLAIN = LowSettings(group_size=3)


def sums(small, x):
  """`run(level, ratio)`: layer -> (integer sums of the mixed rule, of the deployed rule)."""
  model = exact_scales(small.model)
  deployed = deploy.deploy(model, x[:1], levels=LEVELS, link=False)

  @jax.jit
  def run(masks, level):
    truth = rules.mixed_rule(model.model, masks, model.dynamic)
    found = {}

    def both(layer, activation, w, contract):
      own = deploy.deployed_rule(deployed, x, level, out="int32")
      if isinstance(deployed.layers[layer.name], Mixed):
        arguments = layer, activation, w, contract
        found[layer.name] = truth(*arguments), own(*arguments)
      # Onwards with values of ordinary size.
      return rules.float_rule(layer, activation, w, contract)

    graph.with_rule(model.network.apply, both)(model.network.params, x)
    return found

  return lambda level, ratio: run(model.schedule.masks(ratio), jnp.int32(level))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("case", "settings"), [("resnet", BLOCKS), ("vit", PLAIN)])
def test_integer_sums_are_those_of_the_mixed_rule(case, settings, dynamic):
  small = made(CASES[case], settings=settings)
  small = dataclasses.replace(small, model=dataclasses.replace(small.model, dynamic=dynamic))
  run = sums(small, small.x[:2])
  for level, ratio in enumerate(LEVELS):
    found = run(level, ratio)
    assert len(found) >= 4
    for name, (truth, own) in found.items():
      assert own.dtype == jnp.int32
      assert np.abs(truth).max() > 100
      np.testing.assert_array_equal(own, truth, err_msg=f"{name} at {ratio}")


def close(small, deployed, x, ratio, run):
  """Logits of both, and what counts as equal: rounding, and a code that a rounding moved."""
  own = np.asarray(run(deployed, x, deployed.level(ratio)))
  truth = small(x, ratio)
  np.testing.assert_allclose(own, truth, atol=1e-4 * np.std(truth), err_msg=f"at {ratio}")
  return own


@pytest.mark.parametrize(
  "case",
  [
    "resnet",
    "vit",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobile", "bottleneck", "swin")),
  ],
)
def test_logits_at_every_level_from_one_executable(case):
  small = made(CASES[case])
  deployed = deploy.deploy(small.model, small.x[:1], levels=LEVELS)
  run = jax.jit(deploy.apply)
  before = run._cache_size()
  logits = [close(small, deployed, small.x, ratio, run) for ratio in LEVELS]
  assert run._cache_size() == before + 1
  assert not np.allclose(logits[0], logits[-1], atol=1e-2 * np.std(logits[0]))
