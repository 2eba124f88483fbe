"""Populations of the evolutionary search: seeds, generations, and small searches to the optimum."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.orders import Schedule, Space, greedy
from flexiq_jax.search.evolution.keys import Encoding, decode, keys_of, order_of
from flexiq_jax.search.evolution.operators import ask, init, seeds, tell
from tests.search.encodings_for_test import (
  EVEN,
  NAMES,
  OWN,
  SCORES,
  SETTINGS,
  TOTAL,
  UNEVEN,
  decode_all,
  encoding_of,
  frozen_encoding,
  per_layer,
)

LARGE = dataclasses.replace(SETTINGS, population=64, elites=4, tournament=2)


def first_state(encoding, seed=0):
  """A population with fitness 0, 1, ... 15."""
  keys = seeds(jax.random.key(seed), encoding, SETTINGS)
  return init(jax.random.key(seed + 1), keys, jnp.arange(16.0))


# Seeds.


def test_seeds_are_the_given_orders_and_three_kinds():
  encoding = encoding_of(EVEN)
  plain = dataclasses.replace(SETTINGS, noise=0.0)
  orders = [greedy(EVEN, SCORES), np.arange(TOTAL)[::-1]]
  keys = np.asarray(seeds(jax.random.key(3), encoding, plain, orders))
  assert keys.shape == (16, TOTAL) and keys.dtype == np.float32
  for row in keys:
    np.testing.assert_array_equal(row, keys_of(order_of(encoding, row)))
  given, noisy, layered, anyhow = np.split(keys, [2, 7, 12])
  np.testing.assert_array_equal(given, [keys_of(order) for order in orders])
  np.testing.assert_array_equal(noisy, [given[0]] * 5)  # without noise: greedy
  for row in layered:
    for own in OWN:  # inside a layer by score
      np.testing.assert_array_equal(np.argsort(row[own]), np.argsort(SCORES[own]))
  for rows in (layered, anyhow):
    assert len(np.unique(rows, axis=0)) == len(rows)
  again = seeds(jax.random.key(3), encoding, plain, orders)
  np.testing.assert_array_equal(again, keys)
  assert not np.array_equal(seeds(jax.random.key(4), encoding, plain, orders)[12:], anyhow)


def test_noise_moves_groups_of_close_scores():
  encoding = encoding_of(EVEN, scores=np.exp(4.0 * (np.arange(TOTAL) // 2)))  # pairs of equals
  keys = np.asarray(seeds(jax.random.key(0), encoding, SETTINGS))[:6]
  order = np.argsort(keys, axis=1)
  assert len(np.unique(order, axis=0)) > 1
  # exp(4) is eight standard deviations of 0.5; the difference of two draws has sqrt(2) times one.
  np.testing.assert_array_equal(order // 2, [np.arange(TOTAL) // 2] * 6)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_layered_seeds_take_the_same_share_of_every_layer(ratio):
  space = Space.create(("a", "b"), [[1] * 40, [1] * 20], [3, 3])
  encoding = Encoding.create(space, np.random.default_rng(0).lognormal(size=60), [ratio])
  keys = seeds(jax.random.key(0), encoding, SETTINGS)
  for row in keys[6:11]:
    a, b = np.split(np.asarray(decode(encoding, row))[0], [40])
    assert abs(a.sum() - 40 * ratio) <= 1
    assert abs(b.sum() - 20 * ratio) <= 1


def test_layered_seeds_count_what_is_frozen_already():
  space = Space.create(("a", "b"), [[1] * 40, [1] * 20], [3, 3])
  # Half of layer a, and the half that its scores would take last.
  encoding = Encoding.create(space, np.arange(60.0)[::-1], [0.5], np.arange(20))
  keys = seeds(jax.random.key(0), encoding, SETTINGS)
  for row in keys[6:11]:
    a = np.asarray(decode(encoding, row))[0, :40]
    assert abs(a.sum() - 20) <= 1


@pytest.mark.parametrize(
  ("orders", "message"),
  [
    ([np.arange(TOTAL)] * 17, "orders: 17 do not fit in a population of 16"),
    ([np.arange(TOTAL), np.arange(3)], r"orders: number 1 has shape \(3,\), expected \(14,\)"),
    ([np.zeros(TOTAL, int)], r"order: shape \(14,\), not a permutation of 0\.\.13"),
  ],
)
def test_seeds_refuse(orders, message):
  with pytest.raises(ValueError, match=message):
    seeds(jax.random.key(0), encoding_of(EVEN), SETTINGS, orders)


# Budgets and the frozen prefix.


def test_a_frozen_prefix_stays_in_all_seeds_and_generations():
  frozen, encoding = frozen_encoding()
  fixed = keys_of(np.arange(TOTAL))[: len(frozen)]
  planted = seeds(jax.random.key(0), encoding, SETTINGS, [greedy(UNEVEN, SCORES)])
  state = init(jax.random.key(1), planted, jnp.arange(16.0))
  for generation in range(3):
    state, offspring, masks, _ = ask(state, encoding, SETTINGS)
    assert np.asarray(masks)[..., frozen].all()
    state = tell(state, offspring, -generation - jnp.arange(13.0), SETTINGS)
    for made in (planted, offspring, state.keys):
      np.testing.assert_array_equal(np.asarray(made)[:, frozen], [fixed] * len(made))


@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5, 0.75)], ids=["one level", "three levels"])
@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_all_offspring_hit_all_budgets(ratios, freeze):
  encoding = frozen_encoding(ratios)[1] if freeze else encoding_of(UNEVEN, ratios)
  state = first_state(encoding)
  rng = np.random.default_rng(0)
  for _ in range(4):
    state, offspring, masks, _ = ask(state, encoding, SETTINGS)
    assert masks.shape == (13, len(ratios), TOTAL) and offspring.shape == (13, TOTAL)
    for keys, levels in zip(np.asarray(offspring), np.asarray(masks), strict=True):
      order = order_of(encoding, keys)
      np.testing.assert_array_equal(keys, keys_of(order))
      schedule = Schedule(UNEVEN, order)
      for ratio, mask in zip(ratios, levels, strict=True):
        np.testing.assert_array_equal(mask, schedule.mask(ratio))
        taken = UNEVEN.cost[order[mask[order]]]
        assert taken.sum() >= ratio * UNEVEN.cost.sum() > taken.sum() - taken[-1]
      assert np.all(levels[:-1] <= levels[1:])  # nested
    state = tell(state, offspring, rng.normal(size=13), SETTINGS)


# Generations.


def test_ask_is_reproducible_and_goes_on():
  encoding = encoding_of(UNEVEN)
  first = ask(first_state(encoding), encoding, SETTINGS)
  again = ask(first_state(encoding), encoding, SETTINGS)
  for one, other in zip(first[1:], again[1:], strict=True):
    np.testing.assert_array_equal(one, other)
  assert first[0].key == again[0].key
  np.testing.assert_array_equal(first[0].keys, first_state(encoding).keys)
  later = ask(first[0], encoding, SETTINGS)
  assert not np.array_equal(later[1], first[1])
  assert len(np.unique(first[1], axis=0)) > 6  # children do not share their draws


def test_differ_says_whether_a_child_is_new():
  """Each layer costs a third of all, and is on one side in both kinds of parents."""
  space = Space.create(NAMES, [[12] * 7, [21] * 4, [28] * 3], [1, 1, 1])
  encoding = encoding_of(space, (1 / 3,))
  orders = [np.arange(TOTAL), np.r_[7:11, 0:7, 11:14]]  # layers a b c, and b a c
  both = np.stack([keys_of(order) for order in orders])
  known = np.asarray(decode_all(encoding, jnp.asarray(both)))
  np.testing.assert_array_equal(per_layer(known[:, 0]), [[7, 0, 0], [0, 4, 0]])
  state = init(jax.random.key(0), jnp.asarray(np.tile(both, (8, 1))), jnp.zeros(16))
  seen = []
  for _ in range(8):
    state, _, masks, differ = ask(state, encoding, SETTINGS)
    new = [not any(np.array_equal(mask, k) for k in known) for mask in np.asarray(masks)]
    np.testing.assert_array_equal(differ, new)
    seen += new
  assert 0 < np.mean(seen) < 1


def test_tell_keeps_elites_and_sorts():
  encoding = encoding_of(EVEN)
  fitness = np.random.default_rng(0).permutation(16).astype(np.float32)
  planted = seeds(jax.random.key(0), encoding, SETTINGS)
  state = init(jax.random.key(1), planted, fitness)
  np.testing.assert_array_equal(state.fitness, np.arange(16))
  np.testing.assert_array_equal(state.keys, np.asarray(planted)[np.argsort(fitness)])
  assert state.generation == 0
  state, offspring, _, _ = ask(state, encoding, SETTINGS)
  scores = np.array([1, 0, 7, 1, 2, 0.5, 9, 9, 9, 9, 9, 9, -1], np.float32)
  after = tell(state, offspring, scores, SETTINGS)
  assert after.generation == 1 and after.generation.dtype == np.int32
  pool = np.concatenate([np.asarray(state.keys)[:3], offspring])
  values = np.concatenate([[0, 1, 2], scores])
  best = sorted(range(16), key=lambda i: values[i])  # stable: elites before their equals
  np.testing.assert_array_equal(after.fitness, values[best])
  np.testing.assert_array_equal(after.keys, pool[best])
  assert after.key == state.key


def test_elites_stay_where_all_offspring_is_worse():
  encoding = encoding_of(EVEN)
  state = first_state(encoding)
  elites = np.asarray(state.keys[:3])
  for generation in range(1, 4):
    state, offspring, _, _ = ask(state, encoding, SETTINGS)
    state = tell(state, offspring, np.full(13, 100.0), SETTINGS)
    np.testing.assert_array_equal(state.keys[:3], elites)
    np.testing.assert_array_equal(state.fitness[:3], [0, 1, 2])
    assert state.generation == generation


@pytest.mark.parametrize("other", [2.0**127, np.inf])
def test_nan_never_wins(other):
  encoding = encoding_of(EVEN)
  values = np.full(16, np.nan, np.float32)
  values[5] = other
  planted = seeds(jax.random.key(0), encoding, SETTINGS)
  state = init(jax.random.key(1), planted, values)
  np.testing.assert_array_equal(state.fitness, [other] + [np.inf] * 15)
  np.testing.assert_array_equal(state.keys[0], planted[5])
  state, offspring, _, _ = ask(state, encoding, SETTINGS)
  after = tell(state, offspring, np.full(13, np.nan), SETTINGS)
  np.testing.assert_array_equal(after.fitness, state.fitness)
  np.testing.assert_array_equal(after.keys[:3], state.keys[:3])
  values = np.full(13, np.nan)
  values[7] = 1e38
  after = tell(state, offspring, values, SETTINGS)
  np.testing.assert_array_equal(after.keys[0], offspring[7])


def test_shapes_that_do_not_fit_are_refused():
  encoding = encoding_of(EVEN)
  state = first_state(encoding)
  with pytest.raises(ValueError, match=r"fitness: shape \(15,\) for keys of shape \(16, 14\)"):
    init(state.key, state.keys, jnp.zeros(15))
  other = dataclasses.replace(SETTINGS, population=17)
  with pytest.raises(ValueError, match=r"state: keys of shape \(16, 14\), expected \(17, 14\)"):
    ask(state, encoding, other)
  for offspring, values in ((12, 13), (13, 12)):
    with pytest.raises(ValueError, match=r"offspring, fitness: shapes .*, expected \(13, 14\)"):
      tell(state, state.keys[:offspring], jnp.zeros(values), SETTINGS)


def test_generations_and_levels_do_not_compile_anew():
  """One trace of `ask` and of `tell` for a search in two levels, the second with a prefix."""
  traces = []

  def counted(function):
    def traced(*arrays):
      traces.append(function.__name__)
      return function.__wrapped__(*arrays, settings=SETTINGS)

    return jax.jit(traced)

  counted_ask, counted_tell = counted(ask), counted(tell)
  found = ()
  for ratio in (0.25, 0.5):
    encoding = encoding_of(UNEVEN, (ratio,), found)
    state = first_state(encoding, seed=7)
    for generation in range(3):
      state, offspring, masks, _ = counted_ask(state, encoding)
      # The first from NumPy, the others from JAX.
      values = masks.sum(axis=(1, 2)) if generation else np.arange(13)
      state = counted_tell(state, offspring, values.astype(np.float32))
    order = order_of(encoding, state.keys[0])
    found = order[: Schedule(UNEVEN, order).prefix(ratio)]
  assert sorted(traces) == ["ask", "tell"]


# Whole searches.


def quadratic(seed):
  """A fitness with cross terms, the squared sum of the error vectors of what is in 4 bits.

  Returns:
    The fitness, masks `[N, V, T]` -> `[N]`, and the error of each group alone.
  """
  rng = np.random.default_rng(seed)
  vectors = rng.normal(size=(TOTAL, 24)) * rng.lognormal(sigma=0.3, size=(TOTAL, 1))

  def fitness(masks):
    return np.square(np.asarray(masks) @ vectors).sum(axis=(1, 2))

  return fitness, np.square(vectors).sum(axis=1)


def search(space, ratios, seed, config, generations):
  """Runs a search from greedy on.

  Returns:
    The best fitness at first and after each generation, that of the greedy order, that of the best
    order at the end as its schedule has it, and the fitness itself.
  """
  fitness, scores = quadratic(seed)
  encoding = Encoding.create(space, scores, ratios)
  key, seeds_key = jax.random.split(jax.random.key(seed))
  keys = seeds(seeds_key, encoding, config, [greedy(space, scores)])
  state = init(key, keys, fitness(decode_all(encoding, keys)))
  curve = [float(state.fitness[0])]
  for _ in range(generations):
    state, offspring, masks, _ = ask(state, encoding, config)
    state = tell(state, offspring, fitness(masks), config)
    curve.append(float(state.fitness[0]))
  orders = [greedy(space, scores), order_of(encoding, state.keys[0])]
  masks = [[Schedule(space, order).mask(ratio) for ratio in ratios] for order in orders]
  return curve, *fitness(np.array(masks)), fitness


def test_search_finds_the_optimum_of_small_problems():
  """Of all 3432 choices of 7 in 14 groups; a search sees about 440, an eighth."""
  chosen = np.array(list(itertools.combinations(range(TOTAL), 7)))
  choices = np.zeros((len(chosen), 1, TOTAL), bool)
  np.put_along_axis(choices[:, 0], chosen, True, axis=1)
  hits, greedy_hits = 0, 0
  for seed in range(10):
    curve, at_greedy, at_end, fitness = search(EVEN, (0.5,), seed, LARGE, 20)
    optimum = fitness(choices).min()
    assert all(after <= before for before, after in itertools.pairwise(curve))
    assert curve[0] <= at_greedy * (1 + 1e-5)  # float32
    assert curve[-1] == pytest.approx(at_end, rel=1e-5)
    assert at_end >= optimum * (1 - 1e-9)
    hits += at_end <= optimum * (1 + 1e-9)
    greedy_hits += at_greedy <= optimum * (1 + 1e-9)
  assert greedy_hits <= 2
  assert hits >= 6


def test_joint_search_improves_on_greedy_in_the_sum_of_its_levels():
  curve, at_greedy, at_end, _ = search(UNEVEN, (0.25, 0.5, 0.75), 0, SETTINGS, 20)
  assert all(after <= before for before, after in itertools.pairwise(curve))
  assert curve[-1] == pytest.approx(at_end, rel=1e-5)
  assert at_end < 0.9 * at_greedy
