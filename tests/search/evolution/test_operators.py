"""Operators of the evolutionary search: their laws, and the odds of what they draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.orders import Space
from flexiq_jax.search.evolution.keys import Encoding, keys_of, normalize
from flexiq_jax.search.evolution.operators import crossover, mutate, select_parents
from flexiq_jax.search.settings import EvolutionSettings
from tests.search.encodings_for_test import (
  EVEN,
  OWN,
  SETTINGS,
  SIZES,
  TOTAL,
  UNEVEN,
  decode_all,
  encoding_of,
  frozen_encoding,
  per_layer,
)

COUNT = 2000  # individuals; a share of them has a standard deviation of at most 0.011
SINGLE = dataclasses.replace(SETTINGS, layer_rate=1.0, swap_share=0.1)  # one swap in every layer

_mutate = jax.jit(jax.vmap(mutate, (0, None, None, 0)), static_argnums=2)
_crossover = jax.jit(jax.vmap(crossover, (0, None, 0, 0)))
_normalize = jax.jit(jax.vmap(normalize, (None, 0)))


def some_keys(encoding, seed=0):
  return _normalize(encoding, jax.random.uniform(jax.random.key(seed), (COUNT, TOTAL)))


def copies(order):
  return jnp.tile(keys_of(order)[None], (COUNT, 1))


def mutated(encoding, settings=SETTINGS, keys=None):
  """(keys, mutated keys, masks, mutated masks)."""
  keys = some_keys(encoding) if keys is None else keys
  after = _mutate(jax.random.split(jax.random.key(1), COUNT), encoding, settings, keys)
  return tuple(
    map(np.asarray, (keys, after, decode_all(encoding, keys), decode_all(encoding, after)))
  )


def test_crossover_takes_whole_layers_by_a_fair_coin():
  encoding = encoding_of(UNEVEN)
  a, b = some_keys(encoding), 1 + some_keys(encoding, seed=2)  # no key is in both
  made = _crossover(jax.random.split(jax.random.key(0), COUNT), encoding, a, b)
  made, a, b = map(np.asarray, (made, a, b))
  from_a, from_b = per_layer(made == a), per_layer(made == b)
  took_a = from_a == SIZES
  np.testing.assert_array_equal(took_a, from_b != SIZES)
  kinds, counts = np.unique(took_a, axis=0, return_counts=True)
  assert len(kinds) == 8  # each layer for itself
  assert counts.min() > COUNT / 8 / 2


@pytest.mark.parametrize("space", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_mutation_swaps_across_the_cut_in_the_same_layer(space):
  encoding = encoding_of(space)
  keys, after, masks, masks_after = mutated(encoding)
  moved, inside = keys != after, masks[:, 0]
  left, entered = per_layer(moved & inside), per_layer(moved & ~inside)
  np.testing.assert_array_equal(left, entered)
  possible = (per_layer(inside) > 0) & (per_layer(~inside) > 0)
  np.testing.assert_array_equal(left.any(axis=1), possible.any(axis=1))  # a layer at least
  assert (left <= [2, 1, 1]).all()  # max(1, floor(0.3 J))
  for own in OWN:
    np.testing.assert_array_equal(np.sort(keys[:, own]), np.sort(after[:, own]))
  if space is EVEN:
    np.testing.assert_array_equal(masks_after[:, 0] != inside, moved)
    np.testing.assert_array_equal(masks_after.sum(axis=-1), masks.sum(axis=-1))
  # All that moved is on the other side of the cut, as far as keys say.
  cut = np.where(inside, keys, -1).max(axis=1, keepdims=True)
  np.testing.assert_array_equal((after <= cut) != inside, moved)


def test_mutation_with_several_levels_swaps_across_one_of_them():
  encoding = encoding_of(EVEN, (0.25, 0.5, 0.75))
  keys, after, masks, masks_after = mutated(encoding)
  moved = keys != after
  changed = masks != masks_after  # [N, V, T]
  across = (changed == moved[:, None]).all(axis=-1)
  assert across.any(axis=1).all()
  only = across & (across.sum(axis=1, keepdims=True) == 1)
  assert (only.sum(axis=0) > COUNT / 20).all()  # each level has its turn
  np.testing.assert_array_equal(masks.sum(axis=-1), masks_after.sum(axis=-1))


def test_mutation_draws_layers_at_their_rate():
  """P(layer) = rate, and the layer of the smallest draw where no draw is below the rate."""
  keys, after, masks, _ = mutated(encoding_of(EVEN))
  inside = per_layer(masks[:, 0])
  possible = ((inside > 0) & (inside < SIZES)).all(axis=1)
  layers = per_layer(keys != after)[possible] > 0
  one_in_any_case = (1 - 0.4) ** 3 / 3
  np.testing.assert_allclose(layers.mean(axis=0), 0.4 + one_in_any_case, atol=0.045)


def test_mutation_draws_the_number_of_swaps_uniformly():
  encoding = encoding_of(EVEN)
  wide = dataclasses.replace(SETTINGS, layer_rate=1.0, swap_share=0.43)  # 3.01 of 7, 1 of 4 and 3
  order = np.array([0, 1, 2, 7, 8, 11, 12, 3, 4, 5, 6, 9, 10, 13])  # 3, 2, 2 are inside
  keys, after, masks, _ = mutated(encoding, wide, copies(order))
  swaps = per_layer((keys != after) & masks[:, 0])
  shares = [np.mean(swaps[:, 0] == k) for k in range(5)]
  np.testing.assert_allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=0.05)
  np.testing.assert_array_equal(swaps[:, 1:], 1)


def test_a_share_in_decimals_means_what_it_says():
  """0.29 of 100 groups are 29, although 0.29 * 100 is below 29 in binary."""
  space = Space.create(("a",), [[1] * 100], [1])
  encoding = Encoding.create(space, np.ones(100), [0.5])
  settings = EvolutionSettings(swap_share=0.29)
  keys = copies(np.arange(100))
  after = _mutate(jax.random.split(jax.random.key(0), COUNT), encoding, settings, keys)
  swaps = np.sum(np.asarray(after != keys)[:, :50], axis=1)
  assert set(swaps) == set(range(1, 30))


def test_bad_groups_leave_and_good_ones_enter():
  """Single swaps: probability of leaving in proportion to the score, of entering to 1 / score."""
  scores = np.ones(TOTAL)
  scores[:7] = [1, 2, 4, 8, 3, 1, 2]
  encoding = encoding_of(EVEN, scores=scores)
  order = np.array([0, 1, 2, 3, 7, 8, 11, 4, 5, 6, 9, 10, 12, 13])  # layer a: 0 to 3 are inside
  keys, after, _, _ = mutated(encoding, SINGLE, copies(order))
  moved = (keys != after).mean(axis=0)
  np.testing.assert_allclose(moved[:4], scores[:4] / scores[:4].sum(), atol=0.045)
  np.testing.assert_allclose(moved[4:7], 1 / scores[4:7] / (1 / scores[4:7]).sum(), atol=0.045)


def test_cost_per_group_counts_in_these_odds():
  """Equal errors, but one group of the layer is cheap: per cost its error is the largest."""
  scores = np.ones(TOTAL)  # costs in layer a: 4 4 4 4 4 4 1, in units of 10
  encoding = encoding_of(UNEVEN, (0.5,), scores=scores)
  order = np.array([6, 0, 7, 11, 1, 8, 9, 2, 3, 4, 5, 10, 12, 13])
  keys, after, masks, _ = mutated(encoding, SINGLE, copies(order))
  assert masks[0, 0, :7].tolist() == [1, 1, 0, 0, 0, 0, 1]
  moved = (keys != after).mean(axis=0)
  np.testing.assert_allclose(moved[[6, 0, 1]], [4 / 6, 1 / 6, 1 / 6], atol=0.045)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_to_mutate_where_all_groups_are_on_one_side(ratio):
  keys, after, _, _ = mutated(encoding_of(EVEN, (ratio,)))
  np.testing.assert_array_equal(keys, after)


def test_frozen_groups_stay_bit_for_bit():
  frozen, encoding = frozen_encoding()
  fixed = keys_of(np.arange(TOTAL))[: len(frozen)]
  keys = some_keys(encoding)
  random_keys = jax.random.split(jax.random.key(5), COUNT)
  crossed = _crossover(random_keys, encoding, keys, keys[::-1])
  changed = _mutate(random_keys, encoding, SETTINGS, crossed)
  assert (np.asarray(changed) != np.asarray(crossed)).any(axis=1).mean() > 0.9
  for made in (keys, crossed, changed):
    np.testing.assert_array_equal(np.asarray(made)[:, frozen], [fixed] * COUNT)


def test_parents_win_a_tournament_of_different_individuals():
  fitness = jnp.asarray(np.random.default_rng(0).permutation(16).astype(np.float32))
  keys = jax.random.split(jax.random.key(0), COUNT)
  ranks = {}
  for size in (1, 3, 16):
    settings = dataclasses.replace(SETTINGS, tournament=size)
    parents = jax.jit(jax.vmap(lambda key: select_parents(key, fitness, settings)))(keys)
    ranks[size] = np.asarray(fitness)[np.asarray(parents)].astype(int)
  np.testing.assert_array_equal(ranks[16], 0)  # all compete: the best always wins
  np.testing.assert_allclose(np.bincount(ranks[1].ravel()) / (2 * COUNT), 1 / 16, atol=0.015)
  # The winner of three has rank r where the other two are among the 15 - r after it.
  odds = [(15 - r) * (14 - r) / 2 / 560 for r in range(14)]  # 560 = 16 over 3
  np.testing.assert_allclose(
    np.bincount(ranks[3].ravel(), minlength=14) / (2 * COUNT), odds, atol=0.02
  )
  assert np.mean(ranks[3][:, 0] == ranks[3][:, 1]) < 0.2  # one is drawn without the other
