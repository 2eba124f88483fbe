"""The seven lines of the README, on models of many kinds: each step gives what the last gave."""

import contextlib
import io
import pickle
import traceback
import types
from collections.abc import Callable
from typing import Any

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flexiq_jax as fq
from experiments import curve
from experiments.shared.stages import Stages
from flexiq_jax import flexiq
from tests.graph.models_for_test import randomize
from tests.stacks_for_test import IDS, tied_nnx

GROUPS = fq.LowSettings(group_size=2)
TINY = fq.SearchSettings(levels=(0.5,), probes=1, rounds=0, candidates=1)
EXAMPLES = 8
LEVELS = (0.0, 0.5, 1.0)


class Cnn(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2, name="stem")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
    x = nn.Conv(6, (1, 1), name="mix")(x)
    return nn.Dense(5, name="head")(nn.relu(x).mean((1, 2)))


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Linear(6, 8, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(2, 8, decode=False, deterministic=True, rngs=rngs)
    self.head = nnx.Linear(8, 5, rngs=rngs)

  def __call__(self, x):
    x = self.embed(x)
    return self.head((x + self.attend(x)).mean(axis=1))


def linen():
  net, x = Cnn(), normal(EXAMPLES, 6, 6, 3)
  return (net, randomize(net.init(jax.random.key(0), x))), x


def attention():
  return (Attention(nnx.Rngs(0)),), normal(EXAMPLES, 4, 6)


def partition():
  module = equinox.nn.MLP(6, 5, width_size=8, depth=2, key=jax.random.key(0))
  params, static = equinox.partition(module, equinox.is_array)
  return (lambda p, x: jax.vmap(equinox.combine(p, static))(x), params), normal(EXAMPLES, 6)


def einsum():
  weights = [0.5 * normal(*shape, seed=3) for shape in ((6, 8), (2, 4, 6), (5, 12))]

  def apply(params, x):
    x = jax.nn.relu(jnp.einsum("bi,ij->bj", x, params["first"])).reshape(-1, 2, 4)
    x = jax.nn.relu(jnp.einsum("bhd,hde->bhe", x, params["heads"])).reshape(-1, 12)
    return jnp.einsum("of,bf->bo", params["out"], x)

  return (apply, dict(zip(("first", "heads", "out"), weights, strict=True))), normal(EXAMPLES, 6)


def tokens():
  """Stacked blocks of attention under `scan`, and a table that is the head, too."""
  return tied_nnx(), IDS


def normal(*shape, seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
  "make",
  [
    *(pytest.param(linen, marks=pytest.mark.slow), pytest.param(attention, marks=pytest.mark.slow)),
    *(partition, einsum, tokens),
  ],
)
def test_seven_lines(make: Callable[[], Any], tmp_path):
  net, x = make()
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    first = fq.quantize(*net, x, settings=GROUPS)
    model = fq.improve(first, settings=TINY)
  assert all(word in said.getvalue() for word in ("ranges, ", "errors, ", "gram 50 %"))
  assert model.method == "gram"

  lines = str(model).splitlines()
  assert [line.split()[0] for line in lines] == ["layers", "groups", "levels", "order", "drop"]
  assert all(f" at {100 * r:g} %" in lines[4] for r in (0, 0.5, 1))
  assert max(map(len, [*lines, repr(model), repr(model.network), repr(model.grouped)])) < 200

  # One executable for any ratio.
  logits = {ratio: np.asarray(model(x, ratio)) for ratio in (0.0, 0.3, 0.5, 1.0)}
  assert model.network.traces["mixed"] == 1
  assert not np.array_equal(logits[0.0], logits[1.0])

  found = fq.evaluate(model, x, ratios=(0, 0.3, 0.5, 1))
  exact = np.asarray(model.network.float(x)).argmax(-1)
  assert found.metric == "agreement"
  assert found[0.3] == 100 * np.mean(logits[0.3].argmax(-1) == exact)
  assert model.drops[1.0] == pytest.approx(found.drop(1))

  model.save(tmp_path / "model")
  assert [path.name for path in (tmp_path / "model").iterdir()] == ["recipe.json"]
  again = fq.load(tmp_path / "model", *net)
  np.testing.assert_array_equal(again(x, 0.5), logits[0.5])
  assert str(again) == str(model)

  runner = fq.deploy(model, tmp_path / "artifact", levels=LEVELS, sizes=(EXAMPLES,))
  runner.switch(0.5)
  deployed = np.asarray(runner(x))
  np.testing.assert_allclose(deployed, logits[0.5], atol=1e-5, rtol=1e-5)
  read = fq.load_runner(tmp_path / "artifact", *net, x=x, sizes=(EXAMPLES,))
  read.switch(0.5)
  np.testing.assert_array_equal(read(x), deployed)

  fq.export(model, tmp_path / "exported", batch_size=EXAMPLES, levels=LEVELS, platforms=("cpu",))
  run = jax.export.deserialize(bytearray((tmp_path / "exported/model.bin").read_bytes())).call
  weights = dict(np.load(tmp_path / "exported/weights.npz"))
  np.testing.assert_allclose(run(weights, x, np.float32(0.5)), deployed, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def small():
  net, x = einsum()
  with contextlib.redirect_stderr(io.StringIO()) as said:
    model = fq.quantize(*net, x, settings=GROUPS, progress=False)
  assert said.getvalue() == ""
  return net, x, model


def test_traced_ratios_give_what_plain_ones_give(small):
  _, x, model = small
  traced = []

  @jax.jit
  def run(x, ratio):
    traced.append(ratio)
    return model(x, ratio)

  for ratio in (0.3, 0.7):
    np.testing.assert_array_equal(run(x, ratio), model(x, ratio))
  assert len(traced) == 1
  schedule = model.schedule
  masks = jax.jit(jax.vmap(schedule.masks))(jnp.linspace(0, 1, 101))
  for number in range(101):
    for name, mask in schedule.masks(number / 100).items():
      np.testing.assert_array_equal(masks[name][number], mask)


def test_what_was_measured_is_kept_and_searched_with_shift_blocks(small):
  net, x, _ = small
  blocks = fq.LowSettings(group_size=1, shift_block=2)
  model = fq.quantize(*net, [x[:4], x[4:]], names="heads", settings=blocks, progress=False)
  better = fq.improve(model, settings=TINY, progress=False)
  layout = better.schedule.layer_order()["heads"]
  assert np.ptp(better.cuts["heads"].x_shift[layout].reshape(-1, 2), axis=1).max() == 0
  assert better.grouped is model.grouped


def test_own_distance_and_loss(small):
  _, x, model = small
  labels = np.arange(EXAMPLES) % 5
  seen = []

  def first_logit(z, z8):
    seen.append(z8.shape)
    return jnp.abs(z - z8)[:, 0]

  def loss(z, labels):
    seen.append(labels.shape)
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)[:, 0]

  value = lambda model: float(loss(model(x, 0.5), labels).mean())
  better = fq.improve(model, distance=first_logit, settings=TINY, progress=False)
  far = lambda model: float(first_logit(model(x, 0.5), model(x, 0.0)).mean())
  assert far(better) <= far(model)
  assert (EXAMPLES, 5) in seen
  better = fq.improve(model, (x, labels), loss=loss, settings=TINY, progress=False)
  assert value(better) <= value(model)
  assert (EXAMPLES,) in seen
  with pytest.raises(ValueError, match=r"distance: .*3 examples has shape \[\]; \[3\] is accepted"):
    fq.improve(model, distance=lambda z, z8: jnp.square(z - z8).mean(), progress=False)
  with pytest.raises(ValueError, match="batches: a loss wants labels"):
    fq.improve(model, x, loss=loss, progress=False)
  with pytest.raises(ValueError, match="distance, loss: both given"):
    fq.improve(model, (x, labels), loss=loss, distance="kl", progress=False)


def test_largest_ratio_within_a_drop(small):
  _, x, model = small
  exact = np.asarray(model.network.float(x)).argmax(-1)
  agreement = lambda r: 100 * np.mean(np.asarray(model(x, r)).argmax(-1) == exact)
  assert fq.largest_ratio(model, x, max_drop=100) == 1
  allowed = 100 - agreement(0.5)
  ratio = fq.largest_ratio(model, x, max_drop=allowed, steps=4)
  assert ratio == max(r for r in (0, 0.25, 0.5, 0.75, 1) if 100 - agreement(r) <= allowed)
  wrong = (exact + 1) % 5
  found = fq.evaluate(model, [(x[:5], wrong[:5]), (x[5:], wrong[5:])], ratios=0.0)
  assert (found.metric, found.unquantized, found.examples) == ("top-1", 0.0, EXAMPLES)
  with pytest.raises(ValueError, match=r"max_drop: -1; at ratio 0 already"):
    fq.largest_ratio(model, x, max_drop=-1)


def test_other_weights_are_refused_unless_meant(small, tmp_path):
  (apply, params), x, model = small
  model.save(tmp_path)
  other = params | {"out": params["out"] + 1e-6}
  with pytest.raises(ValueError, match=r"made for .* with other weights .*other_weights=True"):
    fq.load(tmp_path, apply, other)
  loaded = fq.load(tmp_path, apply, other, other_weights=True)
  assert loaded.network.fingerprint != model.network.fingerprint
  # The same weights in another precision are the same, counters are no weights.
  exact = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), exact)
  assert fq.Network(apply, exact, x).fingerprint == fq.Network(apply, wide, x).fingerprint


def test_a_run_takes_a_recipe_of_other_weights_only_if_its_config_says_so(small, tmp_path):
  (apply, params), x, model = small
  recipe = model.recipe(model_name="einsum", method="greedy", seed=0)
  path = model.save(tmp_path / "given", name="einsum") / "recipe.json"
  workdir = tmp_path / "run"
  workdir.mkdir()
  config = types.SimpleNamespace(dynamic=False, other_weights=False, recipe=str(path))
  inputs: Any = types.SimpleNamespace(recipe=recipe, config=config)
  place: Any = types.SimpleNamespace(path=workdir)
  stages = Stages(inputs, place)
  stages.__dict__["network"] = fq.Network(apply, params | {"out": 2 * params["out"]}, x)
  with pytest.raises(ValueError, match=r"config\.recipe: made for 'einsum' with other weights"):
    curve._from_recipe(stages)
  assert not [*workdir.iterdir()]
  config.other_weights = True
  assert curve._from_recipe(stages).adaptive["flexiq_greedy"][1] == 0


def test_a_loaded_model_is_improved_with_new_examples(small, tmp_path):
  net, x, model = small
  model.save(tmp_path)
  loaded = fq.load(tmp_path, *net)
  with pytest.raises(ValueError, match="batches: missing; a model that was made from a recipe"):
    fq.improve(loaded)
  better = fq.improve(loaded, iter([x]), settings=TINY, method="greedy", progress=False)
  assert better.grouped is not None
  np.testing.assert_array_equal(better(x, 0.0), model(x, 0.0))


def test_pickling_says_how_to_save(small):
  with pytest.raises(TypeError, match=r"model\.save\(folder\)"):
    pickle.dumps(small[2])


def test_interruption_has_no_foreign_frames(small, monkeypatch):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(flexiq, "calibrate", interrupt)
  with pytest.raises(KeyboardInterrupt, match="quantize was interrupted") as caught:
    fq.quantize(*small[0], small[1])
  frames = traceback.extract_tb(caught.tb)
  assert [frame.name for frame in frames] == ["test_interruption_has_no_foreign_frames", "call"]
  assert caught.value.__context__ is None
