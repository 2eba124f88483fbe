"""Recipe files: what is written is what is read, and nothing else is."""

import dataclasses
import json
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexiq_jax.orders import recipes
from tests.mutants_for_test import MUTANTS, mutants_are_told


def make(sizes=((2, 2, 1), (3,)), order=None, scale=0.1, mean=0.25, **changes):
  """A recipe of a stem without groups and one layer for each entry of `sizes`."""
  layers = [
    recipes.RecipeLayer(
      name="stem", in_channels=3, out_channels=8, macs=96, x_scale=scale, signed=True
    )
  ]
  for number, groups in enumerate(sizes):
    channels = sum(groups)
    cuts = np.split(np.arange(channels)[::-1], np.cumsum(groups)[:-1])
    layers.append(
      recipes.RecipeLayer(
        name=f"layer{number}/conv",
        in_channels=channels,
        out_channels=8,
        macs=8 * channels,
        x_scale=scale * (number + 1),
        signed=bool(number % 2),
        groups=tuple(tuple(cut.tolist()) for cut in cuts),
        x_shift=tuple(number % 5 for _ in groups),
        x_mean=(mean,) * channels,
        low_mean=(-mean,) * channels,
      )
    )
  flat = [(f"layer{n}/conv", j) for n, groups in enumerate(sizes) for j in range(len(groups))]
  order = range(len(flat)) if order is None else order
  return recipes.Recipe(
    model="net",
    method="greedy",
    seed=3,
    settings={"ranges": {"weight": "mse"}, "groups": {"group_size": 4, **changes}},
    layers=tuple(layers),
    order=tuple(flat[i] for i in order),
    fingerprint="0123456789abcdef" * 4,
    input=((1, 8, 8, 3), "float32"),
    drops={0.0: 0.0, 0.25: 1.5},
  )


@st.composite
def made(draw):
  sizes = draw(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=4)
  )
  order = draw(st.permutations(range(sum(map(len, sizes)))))
  numbers = st.floats(1e-30, 1e30)
  block = draw(st.sampled_from([{}, {"shift_block": 0}, {"shift_block": 8}]))
  return make(sizes, order, draw(numbers), draw(numbers), **block)


@given(made())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_saved_is_loaded(tmp_path, recipe):
  recipes.save(tmp_path / "recipe.json", recipe)
  loaded = recipes.load(tmp_path / "recipe.json")
  assert loaded == recipe
  a, b = recipe.schedule(), loaded.schedule()
  np.testing.assert_array_equal(a.order, b.order)
  np.testing.assert_array_equal(a.space.cost, b.space.cost)


def test_groups_longer_than_the_size_asked_for_are_taken_as_they_are(tmp_path):
  """Whole heads: a shift block of 24 channels is two groups of 12, whatever `group_size` says."""
  recipe = make(sizes=((12, 12, 12, 12),), shift_block=24)
  shifts = {"layer0/conv": (1, 1, 3, 3)}
  layers = [dataclasses.replace(e, x_shift=shifts.get(e.name, e.x_shift)) for e in recipe.layers]
  recipe = dataclasses.replace(recipe, layers=tuple(layers))
  recipes.save(tmp_path / "recipe.json", recipe)
  assert recipes.load(tmp_path / "recipe.json") == recipe


def test_schedule_counts_groups_in_order():
  schedule = make(order=(3, 1, 0, 2)).schedule()
  assert schedule.order.tolist() == [3, 1, 0, 2]
  assert schedule.boundaries(0.4) == {"layer0/conv": 1, "layer1/conv": 1}


def test_file_is_for_readers_too(tmp_path):
  recipes.save(tmp_path / "recipe.json", make(order=(3, 1, 0, 2)))
  text = (tmp_path / "recipe.json").read_text()
  assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
  document = json.loads(text)
  assert document["levels"]["0.25"] == {"layer0/conv": 0, "layer1/conv": 1}
  assert document["order"][:2] == ["layer1/conv#0", "layer0/conv#1"]
  # A line for each layer, so that two recipes can be compared with diff.
  assert sum(line.startswith('    {"name"') for line in text.splitlines()) == 3


def layer(document, number=1):
  return document["layers"][number]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: d.update(version=1), "has version 1; this release reads 2"),
    (lambda d: d.pop("version"), "has version None"),
    (lambda d: d.update(format="something"), "is not a recipe"),
    (lambda d: d.pop("layers"), "field 'layers' is missing"),
    (lambda d: layer(d).pop("x_shift"), "layers[1]: field 'x_shift' is missing"),
    (lambda d: layer(d).pop("signed"), "signed"),
    (lambda d: layer(d).update(colour=1), "colour"),
    (lambda d: d.update(layers=[1]), "layers[0]: 1; an object is needed"),
    (lambda d: d.update(layers=3), "layers: 3; a list is needed"),
    (lambda d: d["settings"].pop("groups"), "it lacks 'groups'"),
    (lambda d: d["settings"].update(groups=4), "settings: groups is no object"),
    (lambda d: d["layers"].append(layer(d)), "layer layer0/conv is there more than once"),
    (lambda d: layer(d).update(x_scale=0), "x_scale 0.0 is not positive"),
    (lambda d: layer(d).update(x_scale=float("nan")), "x_scale nan is not positive"),
    (lambda d: layer(d).update(x_scale=float("inf")), "x_scale inf is not positive"),
    (lambda d: layer(d).update(x_scale="a"), "layers[1].x_scale: 'a'; a number is needed"),
    (lambda d: layer(d)["groups"][0].pop(), "groups do not hold each channel once"),
    (lambda d: layer(d)["groups"][0].append(0), "groups do not hold each channel once"),
    (lambda d: layer(d)["x_shift"].pop(), "x_shift needs one value in 0..4"),
    (lambda d: layer(d).update(x_shift=[0, 1, 5]), "x_shift needs one value in 0..4"),
    (lambda d: layer(d)["x_mean"].pop(), "x_mean needs 5 finite values"),
    (lambda d: layer(d).update(low_mean=[float("nan")] * 5), "low_mean needs 5 finite values"),
    (lambda d: d["order"].pop(), "not a permutation of the 4 channel groups"),
    (lambda d: d["order"].append(d["order"][0]), "not a permutation"),
    (lambda d: d["order"].append("stem#0"), "order: 'stem#0' is of no layer that has groups"),
    (lambda d: d["order"].append("layer0/conv#x"), "order: 'layer0/conv#x' is not NAME#GROUP"),
    (lambda d: layer(d).update(signed="conv"), "layers[1].signed: 'conv'; true or false is needed"),
    (lambda d: layer(d).update(x_shift=True), "layers[1].x_shift: True; a list is needed"),
    (
      lambda d: layer(d).update(in_channels=10**12),
      "layers[1].in_channels: 1000000000000; an integer <= 2147483647",
    ),
    (lambda d: layer(d).update(in_channels=10**9), "groups do not hold each channel once"),
    (lambda d: layer(d).update(macs=10**30), "layers[1].macs: 1000"),
    (lambda d: d.update(method="../../x"), "method: '../../x'; a text matching regex"),
    (lambda d: d["order"].append("layer0/conv#1_0"), "is not NAME#GROUP"),
    (lambda d: d.update(more=1), "unknown field 'more'"),
    (lambda d: d.pop("fingerprint"), "field 'fingerprint' is missing"),
    (lambda d: d.update(fingerprint="0123"), "fingerprint: '0123'; a text"),
    (lambda d: d["input"].pop(), "input: [["),
    (lambda d: d.update(input=[[1, 0], "float32"]), "input[0][1]: 0; an integer >= 1"),
    (lambda d: d["drops"].update({"0.5": 101}), "drops[...]: {"),
    (lambda d: d["drops"].update({"2": 1}), "keys of drops: {"),
    (lambda d: d["settings"].update(dynamic=1), "settings: dynamic is neither true nor false"),
    (lambda d: d.update(layers=d["layers"][:1], order=[]), "no channel group may go to 4 bits"),
  ],
)
def test_damage_is_told(tmp_path, change, message):
  path = tmp_path / "recipe.json"
  recipes.save(path, make())
  document = json.loads(path.read_text())
  change(document)
  path.write_text(json.dumps(document))
  with pytest.raises(ValueError) as error:
    recipes.load(path)
  assert str(error.value).startswith(f"recipe: {path} ")
  assert message in str(error.value)


def shifted(shifts, **groups):
  """A recipe whose first layer has three groups, in the order 2, 0, 1, with given shifts."""
  recipe = make(order=(2, 3, 0, 1), **groups)
  layers = [
    dataclasses.replace(e, x_shift=shifts) if e.name == "layer0/conv" else e for e in recipe.layers
  ]
  return dataclasses.replace(recipe, layers=tuple(layers))


def test_groups_of_a_shift_block_have_one_shift(tmp_path):
  path = tmp_path / "recipe.json"
  recipes.save(path, shifted((1, 2, 1), group_size=2, shift_block=4))
  assert recipes.load(path).layers[1].x_shift == (1, 2, 1)
  for shifts, pair in (((1, 2, 2), "0 and 2"), ((3, 2, 1), "0 and 2")):
    wrong = shifted(shifts, group_size=2, shift_block=4)
    message = f"layer layer0/conv: x_shift of groups {pair} differ, .* shift block of 4 channels"
    with pytest.raises(ValueError, match=message):
      recipes.save(path, wrong)
    document = json.loads(path.read_text())
    document["layers"][1]["x_shift"] = shifts
    (tmp_path / "wrong.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
      recipes.load(tmp_path / "wrong.json")
    for block in (None, 0, 1, 2):  # those of a group's size or less ask for nothing
      given = {} if block is None else {"shift_block": block}
      recipes.save(path, shifted(shifts, group_size=2, **given))
      assert recipes.load(path).layers[1].x_shift == shifts
    recipes.save(path, shifted((1, 2, 1), group_size=2, shift_block=4))


@pytest.mark.parametrize("block", ["4", -4, 1.5])
def test_shift_block_of_a_recipe_is_a_number(tmp_path, block):
  with pytest.raises(ValueError, match=r"shift_block .* is not a number of channels"):
    recipes.save(tmp_path / "recipe.json", make(shift_block=block))


def test_other_files_are_told(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"recipe: .*no\.json does not exist"):
    recipes.load(tmp_path / "no.json")
  path = tmp_path / "recipe.json"
  recipes.save(path, make())
  whole = path.read_bytes()
  for content, message in (
    (whole[: len(whole) // 2], "is not JSON"),
    (b"\x93NUMPY\xff\xfe", "is not JSON"),
    (b"", "is not JSON"),
    (b"[1, 2]", "is not a recipe"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      recipes.load(path)


def test_saving_keeps_the_old_file_where_the_new_one_is_wrong(tmp_path):
  path = tmp_path / "recipe.json"
  recipes.save(path, make())
  before = path.read_text()
  with pytest.raises(ValueError, match="permutation"):
    recipes.save(path, dataclasses.replace(make(), order=make().order[:2]))
  assert path.read_text() == before


def facts(recipe):
  names = ("name", "in_channels", "out_channels", "macs")
  return [types.SimpleNamespace(**{n: getattr(e, n) for n in names}) for e in recipe.layers]


def test_a_recipe_has_to_fit_its_model():
  recipe = make()
  recipes.require_fit(recipe, facts(recipe))
  recipes.require_fit(recipe, facts(recipe)[::-1])
  with pytest.raises(ValueError, match=r"3 layers, the model has 2; not in the model: stem"):
    recipes.require_fit(recipe, facts(recipe)[1:])
  other = facts(recipe)
  other[0].name = "conv1"
  with pytest.raises(ValueError, match=r"not in the recipe: conv1; not in the model: stem"):
    recipes.require_fit(recipe, other)
  for name in ("in_channels", "out_channels", "macs"):
    other = facts(recipe)
    setattr(other[2], name, 1)
    with pytest.raises(ValueError, match=rf"layer layer1/conv has {name} \d+ in the recipe and 1"):
      recipes.require_fit(recipe, other)


def test_keys_that_stand_twice_and_deep_files_are_refused(tmp_path):
  path = tmp_path / "recipe.json"
  recipes.save(path, make())
  text = path.read_text()
  path.write_text(text.replace('"seed": 3', '"seed": 3, "seed": 4', 1))
  with pytest.raises(ValueError, match="is damaged: key 'seed' stands more than once"):
    recipes.load(path)
  deep = '{"settings": ' + "[" * 100_000 + "]" * 100_000 + "}"
  path.write_text(deep)
  with pytest.raises(ValueError, match="is not JSON"):
    recipes.load(path)


@pytest.mark.parametrize("count", MUTANTS)
def test_mutants_are_read_or_told(tmp_path, count):
  """Each is refused by name, or means what a recipe can mean and is written as it was read."""
  path = tmp_path / "recipe.json"
  recipes.save(path, make(order=(3, 1, 0, 2)))
  document, read = json.loads(path.read_text()), []

  def tried(mutant):
    path.write_text(json.dumps(mutant))
    read.append(recipes.load(path))

  mutants_are_told(document, tried, count, starts=f"recipe: {path} ")
  for recipe in read:
    recipes.save(path, recipe)
    assert recipes.load(path) == recipe
  assert 0.003 < len(read) / count < 0.5  # names, seeds, means and scales may be others
