"""The package's short API: from a float model to one that runs at any ratio."""

import dataclasses

import jax
import numpy as np
import pytest

from flexiq_jax import flexiq
from flexiq_jax.adaptive import AdaptiveModel, from_recipe
from flexiq_jax.calibrated import calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, recipes
from flexiq_jax.quant import rules
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.quant.selectable import selectable
from tests.graph import models_for_test

RATIOS = (0.0, 0.3, 0.5, 1.0)
SETTINGS = LowSettings(group_size=3)
BLOCKS = LowSettings(group_size=1, shift_block=3, weight_shift_per="output")


@dataclasses.dataclass(frozen=True)
class Made:
  network: Network
  batches: list
  model: AdaptiveModel


def make(name, settings=SETTINGS, **options):
  apply, params = models_for_test.MODELS[name]()
  batches = [np.asarray(models_for_test.image(4, seed=seed)) for seed in (1, 2)]
  network = Network(apply, params, batches[0][:1])
  names = selectable(network.layers, first_last=False, depthwise=True)
  return Made(
    network,
    batches,
    flexiq.quantize(network, batches, names=names, settings=settings, **options),
  )


@pytest.fixture(scope="module")
def plain():
  return make("plain")


@pytest.fixture(scope="module", params=["nnx", "linen", "plain"])
def any_model(request):
  return request.getfixturevalue("plain") if request.param == "plain" else make(request.param)


def test_any_ratio_of_any_model_is_one_program(any_model):
  network, model, x = any_model.network, any_model.model, any_model.batches[0]
  logits = {ratio: np.asarray(model(x, ratio)) for ratio in RATIOS}
  assert network.traces["mixed"] == 1  # `quantize` measured with it
  exact = np.asarray(network.float(x))
  spread = np.square(exact - exact.mean(axis=0)).mean()
  errors = {ratio: np.square(logits[ratio] - exact).mean() / spread for ratio in RATIOS}
  assert errors[0.0] < 0.02
  assert errors[0.0] < errors[1.0] < 1.0
  # Ratio 0 is the 8-bit model, bit for bit, though another program.
  base = {name: dataclasses.replace(q, low=None) for name, q in model.model.items()}
  np.testing.assert_array_equal(logits[0.0], network.uniform(base, x))
  # Another batch shape is another program, another order is none.
  model(x[:2], 0.5)
  other = dataclasses.replace(
    model, schedule=dataclasses.replace(model.schedule, order=model.schedule.order[::-1])
  )
  assert not np.array_equal(other(x, 0.5), logits[0.5])
  assert network.traces["mixed"] == 2


def test_float_model_is_the_one_that_was_given():
  apply, params = models_for_test.linen_model()
  x = models_for_test.image(3)
  network = Network(apply, params, x[:1])
  # Batch norm is folded: equal but for rounding.
  np.testing.assert_allclose(network.float(x), apply(params, x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def blocks():
  return make("plain", BLOCKS)


def laid_out(made, order, settings):
  """The model whose groups are in an order."""
  names = made.model.schedule.space.names
  return calibrate(made.network, made.batches).group(names, settings).ordered(order)


@pytest.mark.parametrize("name", ["plain", "blocks"])
def test_recipe_gives_the_same_model_bit_for_bit(name, request, tmp_path):
  plain = request.getfixturevalue(name)
  settings = SETTINGS if name == "plain" else BLOCKS
  network, x = plain.network, plain.batches[0]
  # A schedule that has been laid out once stays as it is.
  model = laid_out(plain, plain.model.schedule.order, settings)
  np.testing.assert_array_equal(model.schedule.order, plain.model.schedule.order)
  recipe = model.recipe(model_name="plain", method="greedy", seed=0)
  recipe = dataclasses.replace(recipe, drops=plain.model.drops)
  assert recipe == plain.model.recipe(model_name="plain", method="greedy", seed=0)
  recipes.save(tmp_path / "recipe.json", recipe)
  apply, params = models_for_test.plain_model()
  again = from_recipe(Network(apply, params, x[:1]), recipes.load(tmp_path / "recipe.json"))
  for a, b in zip(jax.tree.leaves(plain.model.model), jax.tree.leaves(again.model), strict=True):
    np.testing.assert_array_equal(a, b)
  for ratio in RATIOS:
    np.testing.assert_array_equal(again(x, ratio), plain.model(x, ratio))
  with pytest.raises(ValueError, match="layer out has macs 31 in the recipe and 30"):
    layers = [dataclasses.replace(e, macs=e.macs + (e.name == "out")) for e in recipe.layers]
    from_recipe(network, dataclasses.replace(recipe, layers=tuple(layers)))
  with pytest.raises(ValueError, match=r"settings do not fit this release .*colour"):
    from_recipe(
      network, dataclasses.replace(recipe, settings={"ranges": {"colour": 1}, "groups": {}})
    )


def test_shift_blocks_of_an_order(blocks):
  network, x = blocks.network, blocks.batches[0]
  before = np.random.default_rng(5).permutation(blocks.model.schedule.space.total)
  model = laid_out(blocks, before, BLOCKS)
  schedule, groups = model.schedule, model.cuts
  own = laid_out(blocks, before, dataclasses.replace(BLOCKS, shift_block=0)).cuts
  layout = schedule.layer_order()
  told = False
  for name, g in groups.items():
    shifts = g.x_shift[layout[name]]
    for start in range(0, len(shifts), 3):
      assert np.ptp(shifts[start : start + 3]) == 0
      assert np.ptp(g.w_shift[layout[name]][start : start + 3], axis=0).max() == 0
    told |= not np.array_equal(g.x_shift, own[name].x_shift)
  assert told
  for level in recipes.LEVELS:
    np.testing.assert_array_equal(
      schedule.mask(level), Schedule(schedule.space, before).mask(level)
    )
  base = {name: dataclasses.replace(q, low=None) for name, q in model.model.items()}
  np.testing.assert_array_equal(model(x, 0.0), network.uniform(base, x))
  assert not np.array_equal(model(x, 1.0), model(x, 0.5))


def test_shifts_of_another_order_are_not_written(blocks, tmp_path):
  schedule = laid_out(blocks, blocks.model.schedule.order[::-1], BLOCKS).schedule
  own = laid_out(blocks, blocks.model.schedule.order, dataclasses.replace(BLOCKS, shift_block=0))
  mixed = dataclasses.replace(blocks.model, schedule=schedule, cuts=own.cuts)
  recipe = mixed.recipe(model_name="plain", method="greedy", seed=0)
  with pytest.raises(ValueError, match=r"x_shift of groups .* are in one shift block of 3 channel"):
    recipes.save(tmp_path / "recipe.json", recipe)


def test_dynamic_shifts_are_another_program_with_the_same_ends(plain):
  x, network = plain.batches[0], plain.network
  dynamic = dataclasses.replace(plain.model, dynamic=True)
  before = network.traces.copy()
  np.testing.assert_array_equal(dynamic(x, 0.0), plain.model(x, 0.0))
  assert (network.traces - before)["dynamic"] == 1
  # Shifts follow each example alone: a batch mate with large values changes nothing.
  mates = np.concatenate([x[:1], 3 * x[1:]])
  np.testing.assert_array_equal(dynamic(x, 1.0)[0], dynamic(mates, 1.0)[0])


def test_closed_form_scores_give_an_order_without_images(plain):
  calibrated = calibrate(plain.network, plain.batches)
  scores = calibrated.group(plain.model.schedule.space.names, SETTINGS).scores(exact=False)
  assert scores.shape == (plain.model.schedule.space.total,)
  assert np.isfinite(scores).all() and (scores > 0).any()


def test_uniform_4_bits_keep_what_is_named(plain):
  model = calibrate(plain.network, plain.batches).uniform(4, keep8=("stem",))
  assert {name: q.bits for name, q in model.items()} == {"stem": 8, "heads": 4, "out": 4}
  assert isinstance(model["heads"], rules.QLayer)
  assert np.abs(np.asarray(model["heads"].w)).max() <= 8 < np.abs(np.asarray(model["stem"].w)).max()


def test_an_iterator_is_no_calibration_set(plain):
  with pytest.raises(ValueError, match="can be iterated over anew for every pass"):
    calibrate(plain.network, iter(plain.batches))


def test_layers_are_found_by_name(plain):
  assert plain.network.layer("out").out_channels == 5
  with pytest.raises(ValueError, match="no layer 'outs'; closest names: out"):
    plain.network.layer("outs")


@dataclasses.dataclass(frozen=True)
class Named:
  name: str
  kind: str = "conv"


LAYERS = [
  Named("stem"),
  Named("a/conv"),
  Named("a/depth", "depthwise"),
  Named("b/conv"),
  Named("fc"),
]


@pytest.mark.parametrize(
  ("options", "names"),
  [
    ({}, ("a/conv", "b/conv")),
    ({"first_last": False}, ("stem", "a/conv", "b/conv", "fc")),
    ({"depthwise": True}, ("a/conv", "a/depth", "b/conv")),
    ({"keep8": ("^a/",), "depthwise": True}, ("b/conv",)),
    ({"keep8": ("depth",)}, ("a/conv", "b/conv")),  # matches, if only what stays 8-bit anyway
  ],
)
def test_selectable_layers(options, names):
  assert selectable(LAYERS, **options) == names


@pytest.mark.parametrize(
  ("keep8", "message"),
  [
    (("c/conv",), r"keep8: 'c/conv' matches no layer; closest names: [ab]/conv"),
    (("a(",), r"keep8: 'a\(' is not a regular expression"),
    ((1,), "keep8: 1 is not a regular expression"),
    ((".",), "keep8: none of the 5 layers is left for 4 bits"),
  ],
)
def test_selectable_refuses(keep8, message):
  with pytest.raises(ValueError, match=message):
    selectable(LAYERS, keep8=keep8)
