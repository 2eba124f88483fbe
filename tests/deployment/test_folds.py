"""Orders that fold through an attention: the deployed model with them, its report, its artifact."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import deployment, models
from flexiq_jax.deployment import artifact, document
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.orders import Schedule
from flexiq_jax.quant.grouping import LowSettings
from tests.deployment.deployed_for_test import LEVELS, SWIN, made

HEADS = 4
ARGUMENTS = {"width": 32, "depth": 2, "heads": HEADS, "patch_size": 8, "input_size": 16}
CASE = ("vit_cifar10", ARGUMENTS)
WHOLE = LowSettings(group_size=4, shift_block=8, weight_shift_per="output", whole_heads=True)
SHIFTED = "layers/1/blocks/1/attn/proj"  # several heads, shifted windows
PROJ, QKV = ("blocks/0/attn/proj", "blocks/1/attn/proj"), ("blocks/0/attn/qkv", "blocks/1/attn/qkv")
SPEC = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


@functools.cache
def small(case="vit"):
  """A model whose heads do not come in their own order, and its images."""
  (name, arguments), proj = {"vit": (CASE, PROJ[0]), "swin": (SWIN, SHIFTED)}[case]
  found = made((name, arguments), settings=WHOLE)
  schedule = found.model.schedule
  firsts = np.array([channels[0] for channels in cut_of(found.model, proj)])
  if np.all(np.diff(firsts[schedule.layer_order()[proj]]) > 0):
    schedule = Schedule(schedule.space, schedule.order[::-1].copy())
  return dataclasses.replace(found, model=dataclasses.replace(found.model, schedule=schedule))


def cut_of(model, name):
  """The channels of a layer's groups."""
  group = np.asarray(model.model[name].low.group)
  return [np.flatnonzero(group == g) for g in range(group.max() + 1)]


@functools.cache
def deployed(**options):
  return deployment.deploy(small().model, small().x[:1], levels=LEVELS, **options)


def test_groups_are_whole_heads():
  for name in PROJ:
    cut = cut_of(small().model, name)
    assert len(cut) == HEADS
    assert all(c.tolist() == [*range(c[0], c[0] + 8)] and c[0] % 8 == 0 for c in cut)
  assert len(cut_of(small().model, QKV[0])) == 8
  assert len(cut_of(made(CASE).model, PROJ[0])) == 16


def test_heads_fold_into_queries_keys_and_values():
  found = deployed()
  assert found.wiring.folds == {proj: (qkv,) for proj, qkv in zip(PROJ, QKV, strict=True)}
  assert all(found.layers[name].order is None for name in PROJ)
  assert all(found.layers[name].order is not None for name in QKV)
  gathered = deployed(link=False)
  assert not gathered.wiring.folds
  order = np.asarray(gathered.layers[PROJ[0]].order)
  assert not np.array_equal(order, np.arange(32))
  heads = order.reshape(HEADS, 8)[:, 0] // 8
  for part in range(3):
    wanted = (32 * part + 8 * heads[:, None] + np.arange(8)).reshape(-1)
    own = np.asarray(found.layers[QKV[0]].scale)[32 * part :][:32]
    np.testing.assert_array_equal(own, np.asarray(gathered.layers[QKV[0]].scale)[wanted])


@pytest.mark.parametrize(
  ("case", "dynamic"),
  [("vit", False), ("vit", True), pytest.param("swin", False, marks=pytest.mark.slow)],
)
def test_logits_are_those_of_the_simulation(case, dynamic):
  model = dataclasses.replace(small(case).model, dynamic=dynamic)
  x, run = small(case).x, jax.jit(deployment.apply)
  found = deployment.deploy(model, x[:1], levels=LEVELS)
  for level, ratio in enumerate(LEVELS):
    truth = np.asarray(model(x, ratio))
    own = run(found, x, jnp.int32(level))
    np.testing.assert_allclose(own, truth, atol=1e-4 * truth.std(), err_msg=f"at {ratio}")


def test_biases_of_heads_move_along():
  """Swin's table has a column for each head."""
  model, x = small("swin").model, small("swin").x
  found = deployment.deploy(model, x[:1], levels=LEVELS)
  assert SHIFTED in found.wiring.folds
  path = SHIFTED.replace("proj", "relative_position_bias_table")
  gathered = deployment.deploy(model, x[:1], levels=LEVELS, link=False)
  own, given = (np.asarray(d.floats[path]) for d in (found, gathered))
  heads = np.concatenate([cut_of(model, SHIFTED)[g] for g in model.schedule.layer_order()[SHIFTED]])
  size = len(heads) // given.shape[1]
  assert not np.array_equal(own, given)
  np.testing.assert_array_equal(own, given[:, heads[::size] // size])


def test_nothing_folds_where_it_would_be_wrong():
  x = small().x[:1]
  across = deployment.deploy(made(CASE).model, x, levels=LEVELS)  # groups of two channels
  assert not across.wiring.folds
  assert all(across.layers[name].order is not None for name in PROJ)
  padded = deployment.deploy(small().model, x, levels=LEVELS, granule=16)
  assert not padded.wiring.folds
  low = dict(small().model.model)
  low[QKV[0]] = dataclasses.replace(low[QKV[0]], low=None)
  kept = dataclasses.replace(small().model, model=low)
  assert {*deployment.deploy(kept, x, levels=LEVELS).wiring.folds} == {PROJ[1]}


def test_one_group_needs_no_gather():
  """All channels of a layer in one group stay in the model's own order."""
  one = LowSettings(group_size=32, shift_block=32, weight_shift_per="output")
  found = deployment.deploy(made(CASE, settings=one).model, small().x[:1], levels=LEVELS)
  gathers = [n for n, d in found.layers.items() if isinstance(d, Mixed) and d.order is not None]
  assert gathers == []
  assert not found.wiring.folds


def test_layers_that_write_in_anothers_order_are_no_rule():
  with pytest.raises(ValueError, match=r"takes codes or an order from .* deploy with link=F"):
    deployment.deployed_rule(deployed(), small().x, jnp.int32(0))


def load(path, **arguments):
  module = nnx.eval_shape(lambda: models.create(CASE[0], **ARGUMENTS, **arguments))
  return artifact.load(path, *models.functional(module), SPEC)


def test_artifacts_know_their_folds(tmp_path):
  path = artifact.save(tmp_path / "vit", deployed(), name="vit")
  loaded = load(path)
  assert loaded.wiring.folds == deployed().wiring.folds
  x, run = small().x, jax.jit(deployment.apply)
  for level in range(len(LEVELS)):
    np.testing.assert_array_equal(
      run(loaded, x, jnp.int32(level)), run(deployed(), x, jnp.int32(level))
    )
  found = json.loads((path / "artifact.json").read_text())
  for name, makers in ((PROJ[0], [QKV[1]]), (QKV[0], [PROJ[0]]), ("blocks/9", [QKV[0]])):
    other = found | {"folds": {name: makers}}
    other["sha256"] = document.seal(other)
    (path / "artifact.json").write_text(document._text(other))
    with pytest.raises(ValueError, match=f"{makers[0]} write in the order of {name}; in this"):
      load(path)
