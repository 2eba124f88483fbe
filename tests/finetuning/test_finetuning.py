"""Finetuning over all ratios: what it reaches, what it keeps, and that it can be killed."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexiq_jax as fq
from flexiq_jax import adaptive, finetuning, flexiq, models
from flexiq_jax.finetuning import Examples, FinetuneSettings, joint, objective
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, weights
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.quant.selectable import selectable
from flexiq_jax.quant.straight import Scales
from flexiq_jax.training import loop
from tests.graph import models_for_test
from tests.runs_for_test import several_devices

SETTINGS = FinetuneSettings(
  steps=200,
  batch_size=16,
  learning_rate=0.1,
  other_learning_rate=3e-4,
  scale_learning_rate=1e-3,
  warmup=5,
  loss="l2",
  every=50,
  refit=100,
  reconstruct=False,
)
FEW = dataclasses.replace(SETTINGS, steps=4, every=2, refit=2, warmup=1)


@dataclasses.dataclass(frozen=True)
class Made:
  network: Network
  batches: list
  model: object
  examples: Examples

  def distance(self, model, ratio):
    """Mean squared error of the logits, from the float model's, on other images."""
    x = np.asarray(models_for_test.image(64, seed=9))
    return float(np.square(np.asarray(model(x, ratio)) - np.asarray(self.network.float(x))).mean())


def make(shift_block=0):
  apply, params = models_for_test.MODELS["plain"]()
  images = np.asarray(models_for_test.image(256, seed=1))
  network = Network(apply, params, images[:1])
  names = selectable(network.layers, first_last=False, depthwise=True)
  settings = LowSettings(group_size=2, shift_block=shift_block)
  batches = [images[:32], images[32:64]]
  model = flexiq.quantize(network, batches, names=names, settings=settings, progress=False)
  return Made(network, batches, model, Examples(images))


@pytest.fixture(scope="module")
def start():
  return make()


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
  folder = tmp_path_factory.mktemp("finetuned")
  model, log = finetuning.finetune(
    start.model, start.examples, start.batches, SETTINGS, checkpoint_dir=folder / "steps"
  )
  recipe = model.recipe(model_name="small", method="greedy", seed=0)
  adaptive.save(folder / "recipe.json", recipe, model)
  return model, log, folder


def test_logits_come_nearer_to_the_float_models(start, tuned):
  model, log, _ = tuned
  assert [entry["step"] for entry in log] == [50, 100, 150, 200]
  for ratio in (0.5, 1.0):
    assert start.distance(model, ratio) < 0.85 * start.distance(start.model, ratio)
  assert start.distance(model, 0.0) < 0.05 * start.distance(model, 1.0)


def test_the_order_and_the_groups_stay(start, tuned):
  model, *_ = tuned
  assert np.array_equal(model.schedule.order, start.model.schedule.order)
  for name, cut in start.model.cuts.items():
    for old, new in zip(cut.channels, model.cuts[name].channels, strict=True):
      assert np.array_equal(old, new)


def test_ratio_zero_is_the_8_bit_model_of_the_new_weights(start, tuned):
  model, *_ = tuned
  x = start.batches[0]
  plain = {name: dataclasses.replace(q, low=None) for name, q in model.model.items()}
  assert np.array_equal(model.network.uniform(plain, x), model(x, 0.0))


def test_files_give_the_model_again_to_the_bit(start, tuned):
  model, _, folder = tuned
  apply, params = models_for_test.MODELS["plain"]()
  network = Network(apply, params, start.batches[0][:1])
  again = adaptive.load(folder / "recipe.json", network)
  for name, q in model.model.items():
    for old, new in zip(jax.tree.leaves(q), jax.tree.leaves(again.model[name]), strict=True):
      assert np.array_equal(old, new), name
  for ratio in (0.0, 0.4, 1.0):
    assert np.array_equal(model(start.batches[0], ratio), again(start.batches[0], ratio))


def test_the_result_may_lie_on_the_way_and_needs_no_second_training(start, tuned):
  end, log, folder = tuned
  half, again = finetuning.finetune(
    *(start.model, start.examples, start.batches),
    dataclasses.replace(SETTINGS, interpolate=0.5),
    checkpoint_dir=folder / "steps",
    progress=lambda entry: pytest.fail(f"trained again: {entry}"),
  )
  assert again == log
  halves = jax.tree.map(lambda a, b: (a + b) / 2, start.network.params, end.network.params)
  for old, new in zip(jax.tree.leaves(halves), jax.tree.leaves(half.network.params), strict=True):
    np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-7)
  for name, q in half.model.items():
    both = start.model.model[name].x_scale, end.model[name].x_scale
    np.testing.assert_allclose(q.x_scale, np.sqrt(both[0] * both[1]), rtol=1e-5)
  # Three quarters of what is to be won where losses are quadratic, for a quarter of the harm.
  near, far, made = (start.distance(m, 1.0) for m in (end, start.model, half))
  assert near < made < near + 0.5 * (far - near)
  harm, none, some = (start.distance(m, 0.0) for m in (end, start.model, half))
  assert some - none < 0.5 * (harm - none)


def test_shift_blocks_keep_their_shifts_in_common():
  made = make(shift_block=4)
  trained = jax.tree.map(lambda a: 1.1 * a, made.network.params)
  scales = {name: Scales(q.x_scale, 0.9 * q.w_scale) for name, q in made.model.model.items()}
  model = finetuning.refit(made.model, trained, scales, made.batches)
  for cut in model.cuts.values():
    for block in np.unique(cut.block):
      assert len(set(cut.x_shift[cut.block == block].tolist())) == 1


def test_a_killed_run_ends_with_the_same_bits(start, tuned, tmp_path):
  def run(progress=None):
    return finetuning.finetune(
      *(start.model, start.examples, start.batches, SETTINGS),
      checkpoint_dir=tmp_path / "killed",
      progress=progress,
    )

  def kill(entry):
    if entry["step"] == 100:
      raise KeyboardInterrupt

  whole, log, _ = tuned
  with pytest.raises(KeyboardInterrupt):
    run(kill)
  resumed, again = run()
  assert again == log
  for old, new in zip(
    jax.tree.leaves((whole.network.params, whole.model)),
    jax.tree.leaves((resumed.network.params, resumed.model)),
    strict=True,
  ):
    assert np.array_equal(old, new)
  with pytest.raises(ValueError, match="finetune"):
    finetuning.finetune(
      *(start.model, start.examples, start.batches, dataclasses.replace(SETTINGS, warmup=2)),
      checkpoint_dir=tmp_path / "killed",
    )


DEVICES = """
import jax, numpy as np
from tests.finetuning import test_finetuning as t
from flexiq_jax import finetuning
from jax.sharding import Mesh
made = t.make()
mesh = Mesh(np.array(jax.devices()), ("examples",))
assert mesh.size == 8
model, log = finetuning.finetune(made.model, made.examples, made.batches, t.FEW, mesh=mesh)
one, first = finetuning.finetune(made.model, made.examples, made.batches, t.FEW)
assert abs(log[-1]["loss"] - first[-1]["loss"]) < 1e-5 * first[-1]["loss"], (log, first)
for a, b in zip(jax.tree.leaves(model.network.params), jax.tree.leaves(one.network.params)):
  np.testing.assert_allclose(a, b, atol=1e-5)
"""


@pytest.mark.slow
def test_eight_devices_find_what_one_finds():
  root = pathlib.Path(__file__).parent.parent.parent
  env = {"XLA_FLAGS": several_devices(8), "PYTHONPATH": str(root)}
  done = subprocess.run(
    [sys.executable, "-c", DEVICES],
    cwd=root,
    env=os.environ | env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]


def test_uniform_4_bits_are_finetuned_likewise(start):
  calibrated = flexiq.calibrate(start.network, start.batches)
  four = calibrated.uniform(4, keep8=[start.network.layers[0].name])
  (network, layers), _ = finetuning.finetune_uniform(start.network, four, start.examples, SETTINGS)
  assert {name: q.bits for name, q in layers.items()} == {name: q.bits for name, q in four.items()}
  before = start.distance(lambda x, _: start.network.uniform(four, x), 1)
  assert start.distance(lambda x, _: network.uniform(layers, x), 1) < 0.85 * before


def test_traced_masks_are_the_schedules(start):
  schedule = start.model.schedule
  assert isinstance(schedule, Schedule)
  traced = jax.jit(schedule.masks)
  for ratio in np.linspace(0, 1, 23):
    found = traced(np.float32(ratio))
    for name, mask in schedule.masks(float(np.float32(ratio))).items():
      assert np.array_equal(found[name], mask), (ratio, name)


@pytest.mark.parametrize(
  ("examples", "changes", "message"),
  [
    (Examples(np.zeros((0, 8, 8, 3))), {}, "examples: none"),
    (Examples(np.zeros((9, 8, 8, 3))), {}, r"batch_size: 16; 1..9 is accepted"),
    (None, {"label_weight": 0.5}, "label_weight: 0.5, but the examples have no labels"),
    (Examples(np.zeros((20, 8, 8, 3)), np.zeros(3, int)), {}, "labels: 3 for 20 examples"),
  ],
)
def test_examples_that_do_not_do(start, examples, changes, message):
  settings = dataclasses.replace(SETTINGS, **changes)
  with pytest.raises(ValueError, match=message):
    finetuning.finetune(start.model, examples or start.examples, start.batches, settings)


def test_distances_count_relative_to_those_before_the_training(start):
  """A step of no length: what is logged is the distance, and the loss is what is left of it, 1."""
  rates = ("learning_rate", "other_learning_rate", "scale_learning_rate")
  settings = dataclasses.replace(
    FEW,
    **dict.fromkeys(rates, 1e-12),
    warmup=0,
    steps=1,
    every=1,
    refit=0,
    batch_size=64,
    balance=1.0,
  )
  examples = Examples(start.examples.inputs[:64])  # all of them in a batch
  ratios, unit = objective.distances(start.network, start.model, examples, settings)
  x = examples.inputs
  for ratio, value in zip(ratios, unit, strict=True):
    apart = np.square(np.asarray(start.model(x, ratio)) - np.asarray(start.network.float(x)))
    assert value == pytest.approx(apart.sum(axis=1).mean(), rel=1e-4)
  assert unit[0] < unit[-1]
  for ratio, value in ((0.0, unit[0]), (1.0, unit[-1])):
    one = dataclasses.replace(settings, anchors=(), ratios=(ratio,))
    _, log = finetuning.finetune(start.model, examples, start.batches, one)
    assert log[0]["loss"] == pytest.approx(1.0, rel=1e-4)
    half = dataclasses.replace(one, balance=0.5)
    _, log = finetuning.finetune(start.model, examples, start.batches, half)
    assert log[0]["loss"] == pytest.approx(np.sqrt(value), rel=1e-4)
    plain = dataclasses.replace(one, balance=0.0)
    _, log = finetuning.finetune(start.model, examples, start.batches, plain)
    assert log[0]["loss"] == log[0]["loss_drawn"] == pytest.approx(value, rel=1e-4)


def test_outputs_of_layers_count_relative_to_their_squares():
  """Two layers side by side, so that the logits are their outputs."""
  a, b, x = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
  params, x = {"a": a[:8, :6], "b": 50 * b[:8, :6]}, x[:, :8]
  apply = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], axis=1)
  network = Network(apply, params, x[:1])
  model = flexiq.quantize(network, [x], names=["a", "b"], progress=False)
  rates = dict.fromkeys(("learning_rate", "other_learning_rate", "scale_learning_rate"), 1e-12)
  one = {"steps": 1, "every": 1, "refit": 0, "warmup": 0, "anchors": (), "ratios": (1.0,)}
  settings = dataclasses.replace(SETTINGS, **rates, **one, batch_size=64)
  losses = []
  for weight in (0.0, 1000.0):
    weighed = dataclasses.replace(settings, output_weight=weight)
    losses.append(finetuning.finetune(model, Examples(x), [x], weighed)[1][0]["loss"])
  wanted = np.asarray(network.float(x))
  apart = np.square(np.asarray(model(x, 1.0)) - wanted).reshape(64, 2, 6).mean(axis=(0, 2))
  relative = apart / np.square(wanted).reshape(64, 2, 6).mean(axis=(0, 2))
  assert losses[1] - losses[0] == pytest.approx(1000.0 * relative.mean(), rel=1e-3)


def test_weights_move_in_steps_of_their_channel(start):
  """Adam's first move is 1 by each number, whatever its gradient; a channel without range stays."""
  network, settings = start.network, dataclasses.replace(SETTINGS, warmup=0)
  layer = network.layers[0]
  steps = {q.name: jnp.geomspace(1e-6, 1.0, q.out_channels) for q in network.layers}
  steps[layer.name] = steps[layer.name].at[0].set(0.0)
  trained = {"params": network.params, "log_scales": {"a": jnp.ones(3)}}
  optimizer = joint.make_optimizer(settings, network.layers, steps)
  gradient = jax.tree.map(lambda a: 7.0 * jnp.ones_like(a), trained)
  moves, _ = optimizer.update(gradient, optimizer.init(trained), trained)
  found = layer.canonical(models.flatten(moves["params"])[layer.param])
  expected = jnp.broadcast_to(-0.1 * steps[layer.name].reshape(layer.groups, 1, 1, -1), found.shape)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  layers = {q.param for q in network.layers}
  others = [v for path, v in models.flatten(moves["params"]).items() if path not in layers]
  assert others
  for move in others:
    np.testing.assert_allclose(move, jnp.full_like(move, -3e-4), rtol=1e-5)
  np.testing.assert_allclose(moves["log_scales"]["a"], jnp.full(3, -1e-3), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops(start, tmp_path):
  settings = dataclasses.replace(FEW, other_learning_rate=1e30, warmup=0)
  with pytest.raises(loop.DivergedError, match="diverged"):
    finetuning.finetune(start.model, start.examples, start.batches, settings)


def test_dynamic_models_are_refused(start):
  model = dataclasses.replace(start.model, dynamic=True)
  with pytest.raises(ValueError, match="static"):
    finetuning.finetune(model, start.examples, start.batches, FEW)


def copied(folder, to):
  for name in ("recipe.json", weights.NAME):
    (to / name).write_bytes((folder / name).read_bytes())
  return to / "recipe.json"


def test_recipe_without_its_weights(start, tuned, tmp_path):
  path = copied(tuned[2], tmp_path)
  (tmp_path / weights.NAME).unlink()
  with pytest.raises(FileNotFoundError, match=r"finetuned\.safetensors, which is missing"):
    adaptive.load(path, start.network)


def test_recipe_that_changed_behind_its_weights(start, tuned, tmp_path):
  path = copied(tuned[2], tmp_path)
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
  with pytest.raises(ValueError, match="was not written with"):
    adaptive.load(path, start.network)


def test_damaged_weights(start, tuned, tmp_path):
  path, rng = copied(tuned[2], tmp_path), np.random.default_rng(0)
  content = (tmp_path / weights.NAME).read_bytes()
  for bit in rng.integers(0, 8 * len(content), 40):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    (tmp_path / weights.NAME).write_bytes(changed)
    with pytest.raises(ValueError, match="recipe: "):
      adaptive.load(path, start.network)


def test_weights_of_another_model(tuned, tmp_path):
  apply, params = models_for_test.MODELS["linen"]()
  other = Network(apply, params, np.asarray(models_for_test.image(1)))
  with pytest.raises(ValueError, match="recipe: made for"):
    adaptive.load(tuned[2] / "recipe.json", other)


def test_the_short_way(start, tmp_path):
  """Finetune, search again, save and load: weights and scales stay those that were trained."""
  x = np.asarray(start.examples.inputs)
  apply, params = models_for_test.MODELS["plain"]()
  options = {"settings": LowSettings(group_size=2), "progress": False}
  model = fq.quantize(apply, params, x, names=("heads", "out"), **options)
  tuned = fq.finetune(model, x, settings=FEW, progress=False)
  assert tuned.w_scales is not None and set(tuned.drops) == set(model.drops)
  assert (tuned.method, tuned.seed) == (model.method, model.seed)
  search = fq.SearchSettings(levels=(0.5,), probes=1, rounds=0, candidates=1)
  better = fq.improve(tuned, settings=search, progress=False)  # on what it was calibrated on
  assert better.method == "gram"
  for name, q in tuned.model.items():
    assert np.array_equal(q.w, better.model[name].w)
  better.save(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == [weights.NAME, "recipe.json"]
  again = fq.load(tmp_path, apply, params)
  assert np.array_equal(again(x[:8], 0.5), better(x[:8], 0.5))
  runner = fq.deploy(again, sizes=(8,))
  runner.switch(1.0)
  np.testing.assert_allclose(runner(x[:8]), again(x[:8], 1.0), rtol=1e-5, atol=1e-5)


def test_the_short_way_says_what_is_missing(start):
  with pytest.raises(ValueError, match=r"label_weight: 1\.0, but the examples have no labels"):
    settings = dataclasses.replace(FEW, label_weight=1.0)
    fq.finetune(start.model, start.batches, settings=settings, progress=False)
  alone = dataclasses.replace(start.model, grouped=None)
  with pytest.raises(ValueError, match="batches: missing"):
    fq.finetune(alone, progress=False)
  blocks = dataclasses.replace(
    start.model, settings=LowSettings(group_size=2, shift_block=4), w_scales={}
  )
  with pytest.raises(ValueError, match="search, then finetune"):
    fq.improve(blocks, start.batches[0], progress=False)
