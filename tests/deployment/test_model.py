"""The deployed model against the mixed rule: integer sums, codes, logits, one executable."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import deployment, graph
from flexiq_jax.deployment import layers
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.kernels import tpu
from flexiq_jax.kernels.tile_files import Shape
from flexiq_jax.quant import rules
from flexiq_jax.quant.grouping import LowSettings
from tests.deployment.deployed_for_test import (
  BLOCKS,
  BOTTLENECK,
  LEVELS,
  MOBILE,
  RESNET,
  SHAPES,
  SWIN,
  VIT,
  WIDE,
  exact_scales,
  made,
  ones_own,
)

CASES = {"resnet": RESNET, "bottleneck": BOTTLENECK, "vit": VIT, "mobile": MOBILE, "swin": SWIN}
# Without shift blocks, and with groups that do not divide the channels.
PLAIN = LowSettings(group_size=3)


def sums(small, x, granule=2):
  """`run(level, ratio)`: layer -> (integer sums of the mixed rule, of the deployed rule)."""
  model = exact_scales(small.model)
  deployed = deployment.deploy(model, x[:1], levels=LEVELS, link=False, granule=granule)

  @jax.jit
  def run(masks, level):
    truth = rules.mixed_rule(model.model, masks, model.dynamic)
    found = {}

    def both(layer, activation, w, contract):
      own = deployment.deployed_rule(deployed, x, level, out="int32")
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
  deployed = deployment.deploy(small.model, small.x[:1], levels=LEVELS)
  run = jax.jit(deployment.apply)
  before = run._cache_size()
  logits = [close(small, deployed, small.x, ratio, run) for ratio in LEVELS]
  assert run._cache_size() == before + 1
  assert not np.allclose(logits[0], logits[-1], atol=1e-2 * np.std(logits[0]))


def test_links_change_nothing():
  """Folding orders into producers gives the gathered model, up to the rounding of epilogues."""
  small = made(RESNET)
  x, run = small.x[:3], jax.jit(deployment.apply)
  linked = deployment.deploy(small.model, x[:1], levels=LEVELS)
  gathered = deployment.deploy(small.model, x[:1], levels=LEVELS, link=False)
  orders = [d.order is None for d in linked.layers.values() if isinstance(d, Mixed)]
  assert sum(orders) == 3
  assert all(d.order is not None for d in gathered.layers.values() if isinstance(d, Mixed))
  for level in range(len(LEVELS)):
    a, b = (np.asarray(run(d, x, jnp.int32(level))) for d in (linked, gathered))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.std(a))
  with pytest.raises(ValueError, match=r"layer1/0/conv2 takes codes .* deploy with link=False"):
    deployment.deployed_rule(linked, x, 0)


def test_requantized_codes_are_those_of_the_quantize_step():
  """A producer's epilogue against float results that the consumer quantizes itself."""
  small = made(VIT)
  linked, gathered = (
    deployment.deploy(small.model, small.x[:1], levels=LEVELS, link=link) for link in (True, False)
  )
  d, own = linked.layers["blocks/0/mlp/fc1"], gathered.layers["blocks/0/mlp/fc1"]
  consumer, alone = (m.layers["blocks/0/mlp/fc2"] for m in (linked, gathered))
  layer = small.model.network.layer("blocks/0/mlp/fc1")
  x = jax.random.normal(jax.random.key(3), (3000, layer.in_channels))

  @jax.jit
  def codes(level):
    operand = layers.quantized(d, layer, {}, x, level, False)
    emitted = layers.run_mixed(d, operand, level, consumer=layers.requantize(consumer, level))
    y = layers.run_mixed(own, layers.quantized(own, layer, {}, x, level, False), level)
    step = layers.quantized(alone, layer, {}, y, level, False)
    return emitted, step

  for level in range(len(LEVELS)):
    emitted, step = codes(jnp.int32(level))
    for name in ("x8", "x4"):
      a, b = (np.asarray(getattr(e, name), np.int32) for e in (emitted, step))
      off = np.abs(a - b)
      assert off.max() <= 1
      assert (off > 0).mean() <= 1e-5


def test_dynamic_shifts_deploy():
  small = made(RESNET)
  small = dataclasses.replace(small, model=dataclasses.replace(small.model, dynamic=True))
  deployed = deployment.deploy(small.model, small.x[:1], levels=LEVELS)
  run = jax.jit(deployment.apply)
  static = made(RESNET)(small.x, 1.0)
  for ratio in (0.0, 1.0):
    logits = close(small, deployed, small.x, ratio, run)
  assert not np.allclose(logits, static, atol=1e-3 * np.std(static))
  # An example's result does not depend on its batch.
  one = np.asarray(run(deployed, small.x[2:3], jnp.int32(len(LEVELS) - 1)))
  np.testing.assert_allclose(one[0], logits[2], atol=1e-4 * np.std(logits))


def test_a_model_of_ones_own_with_a_depthwise_and_a_grouped_convolution():
  own, x = ones_own()
  deployed = deployment.deploy(own, x[:1], levels=LEVELS)
  assert deployed.wiring.between == frozenset()  # in 4 bits itself
  kinds = {name: type(d).__name__ for name, d in deployed.layers.items()}
  assert kinds == dict.fromkeys(SHAPES, "Plain") | {"expand": "Mixed", "project": "Mixed"}
  assert deployed.layers["grouped"].masks.shape == (4, 3)
  run = jax.jit(deployment.apply)
  for ratio in LEVELS:
    close(lambda x, r: np.asarray(own(x, r)), deployed, x, ratio, run)


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_kernel_of_a_tpu_gives_the_same(case):
  """In interpret mode: the kernel's padding, and codes that it hands on to the next kernel."""
  small = made(CASES[case])
  x = small.x[:2]
  deployed = deployment.deploy(small.model, x[:1], levels=LEVELS, granule=128)
  kernel = functools.partial(deployment.apply, implementation="tpu", interpret=True)
  run, reference = jax.jit(kernel), jax.jit(deployment.apply)
  for level in range(len(LEVELS)):
    truth = reference(deployed, x, jnp.int32(level))
    np.testing.assert_allclose(run(deployed, x, jnp.int32(level)), truth, atol=1e-5 * np.std(truth))


def test_measured_tiles_give_the_same(monkeypatch):
  """Of linked layers, too: what the consumer's own tiles read, its producer has written."""
  small = made(VIT)
  x = small.x[:2]
  deployed = deployment.deploy(small.model, x[:1], levels=LEVELS, granule=128)
  assert any(feed.producer for feed in deployed.wiring.feeds.values())
  tokens, own = 2 * 5, tpu.Tiles(m=64, n=128, k=768)
  mixed = {name: d.weights for name, d in deployed.layers.items() if isinstance(d, Mixed)}
  tuned = {
    Shape(m=tokens, k=len(w.w8), n=w.w8.shape[1], block=w.block): own for w in mixed.values()
  }
  taken, run = [], tpu.mixed_matmul

  def spy(*args, tiles, **options):
    taken.append(tiles)
    return run(*args, tiles=tiles, **options)

  monkeypatch.setattr(tpu, "mixed_matmul", spy)
  kernel = functools.partial(deployment.apply, implementation="tpu", interpret=True, tuned=tuned)
  run_tuned, reference = jax.jit(kernel), jax.jit(deployment.apply)
  for level in range(len(LEVELS)):
    truth = reference(deployed, x, jnp.int32(level))
    found = run_tuned(deployed, x, jnp.int32(level))
    np.testing.assert_allclose(found, truth, atol=1e-5 * np.std(truth))
  assert taken == [own] * len(mixed)


@pytest.mark.parametrize("dynamic", [False, True])
def test_windows_slide_where_channels_fill_registers(dynamic):
  """The second layer takes codes of the first; groups are finer than shift blocks."""
  small = made(WIDE, settings=LowSettings(group_size=16, shift_block=32), dynamic=dynamic)
  no = deployment.deploy(small.model, small.x[:1], levels=LEVELS)
  assert not any(d.slides for d in no.layers.values() if isinstance(d, Mixed))
  deployed = deployment.deploy(small.model, small.x[:1], levels=LEVELS, granule=128)
  wide = [d for d in deployed.layers.values() if isinstance(d, Mixed)]
  assert [d.slides for d in wide] == [True, True]
  assert [bool(d.feeds) for d in wide] == [True, False]
  # Two blocks of 32 channels; each is there four times, so that 9 positions take 3 steps.
  assert [d.weights.w8.shape for d in wide] == [(768, 256), (768, 64)]
  run = jax.jit(deployment.apply)
  for ratio in LEVELS:
    close(small, deployed, small.x, ratio, run)
  if dynamic:
    return
  x = small.x[:2]
  kernel = jax.jit(functools.partial(deployment.apply, implementation="tpu", interpret=True))
  for level in range(len(LEVELS)):
    truth = run(deployed, x, jnp.int32(level))
    got = kernel(deployed, x, jnp.int32(level))
    np.testing.assert_allclose(got, truth, atol=1e-5 * np.std(truth))
  compare = sums(small, x, granule=128)
  for level, ratio in enumerate(LEVELS):
    for truth, own in compare(level, ratio).values():
      np.testing.assert_array_equal(own, truth)


@pytest.mark.parametrize("dynamic", [False, True])
def test_orders_fold_through_a_depthwise_convolution(dynamic):
  own, x = ones_own(depthwise=False)
  own = dataclasses.replace(own, dynamic=dynamic)
  deployed = deployment.deploy(own, x[:1], levels=LEVELS)
  assert deployed.wiring.between == {"depthwise"}
  feeds = {n: f.producer for n, f in deployed.wiring.feeds.items() if f.producer}
  assert feeds == {"depthwise": "expand", "project": "depthwise"}
  places = len(deployed.layers["depthwise"].scale)
  assert deployed.layers["expand"].scale.shape == (places,)
  run = jax.jit(deployment.apply)
  for ratio in LEVELS:
    close(lambda x, r: np.asarray(own(x, r)), deployed, x, ratio, run)
  with pytest.raises(ValueError, match="depthwise takes codes"):
    deployment.deployed_rule(deployed, x, 0)


def test_padding_of_the_order_passes_through_a_depthwise_convolution():
  settings = LowSettings(group_size=5, shift_block=10)
  own, x = ones_own(depthwise=False, settings=settings)
  deployed = deployment.deploy(own, x[:1], levels=LEVELS, granule=8)
  assert len(deployed.layers["depthwise"].scale) == 32  # of 12 channels
  run = jax.jit(deployment.apply)
  for ratio in (0.0, 0.5, 1.0):
    close(lambda x, r: np.asarray(own(x, r)), deployed, x, ratio, run)


def test_models_in_bfloat16_are_not_linked_and_agree():
  small = made(("resnet8", {"width": 8, "depths": (1,), "dtype": "bfloat16"}))
  deployed = deployment.deploy(small.model, small.x[:1], levels=LEVELS)
  assert not any(feed.producer for feed in deployed.wiring.feeds.values())
  run = jax.jit(deployment.apply)
  for ratio in (0.0, 1.0):
    own, truth = np.asarray(run(deployed, small.x, deployed.level(ratio))), small(small.x, ratio)
    # A sum after another fusion may be rounded to the next bfloat16.
    np.testing.assert_allclose(own, truth, atol=0.02 * np.std(truth))
