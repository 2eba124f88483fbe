"""Keys and orders: decoding against `Schedule`, with and without a frozen prefix."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search.evolution.keys import Encoding, decode, keys_of, normalize, order_of

TOTAL, LEVELS = 14, 3  # one shape for all examples: nothing compiles twice
ratios = st.one_of(
  st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 1000).map(lambda i: i / 1000)
)


@st.composite
def encodings(draw):
  """(space, ratios, frozen prefix, encoding)."""
  cuts = sorted(draw(st.sets(st.integers(1, TOTAL - 1), max_size=4)))
  bounds = [0, *cuts, TOTAL]
  sizes = [b - a for a, b in itertools.pairwise(bounds)]
  channels = [draw(st.lists(st.integers(1, 40), min_size=s, max_size=s)) for s in sizes]
  macs = draw(st.lists(st.integers(1, 5000), min_size=len(sizes), max_size=len(sizes)))
  space = Space.create([f"layer{i}" for i in range(len(sizes))], channels, macs)
  levels = draw(st.lists(ratios, min_size=LEVELS, max_size=LEVELS))
  lower = draw(st.sampled_from([0.0, min(levels) / 2, min(levels)]))
  order = np.array(draw(st.permutations(range(TOTAL))))
  frozen = order[: Schedule(space, order).prefix(lower)]
  return space, levels, frozen, Encoding.create(space, np.ones(TOTAL), levels, frozen)


# Few values, so that there are ties; and negative zero, which is no less than zero.
some_keys = st.lists(
  st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, -1.0]),
    st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
  ),
  min_size=TOTAL,
  max_size=TOTAL,
).map(lambda keys: np.array(keys, np.float32))


@settings(deadline=None)
@given(encodings(), some_keys)
def test_decoded_keys_are_the_masks_of_their_schedule(drawn, keys):
  space, levels, frozen, encoding = drawn
  free = [g for g in range(TOTAL) if g not in frozen]
  order = [*frozen, *sorted(free, key=lambda g: keys[g])]  # Python's sort is stable
  np.testing.assert_array_equal(order_of(encoding, keys), order)
  masks = decode(encoding, jnp.asarray(keys))
  assert masks.dtype == bool
  schedule = Schedule(space, np.array(order, int))
  np.testing.assert_array_equal(masks, [schedule.mask(ratio) for ratio in levels])
  assert np.asarray(masks)[:, frozen].all()


@settings(deadline=None)
@given(encodings(), some_keys)
def test_normalized_keys_are_ranks_and_stand_for_the_same_order(drawn, keys):
  _, _, frozen, encoding = drawn
  ranks = np.asarray(normalize(encoding, jnp.asarray(keys)))
  assert ranks.dtype == np.float32
  order = order_of(encoding, keys)
  np.testing.assert_array_equal(ranks, keys_of(order))  # bit for bit
  np.testing.assert_array_equal(ranks[frozen], np.asarray(encoding.fixed)[frozen])
  np.testing.assert_array_equal(np.argsort(ranks), order)
  np.testing.assert_array_equal(normalize(encoding, jnp.asarray(ranks)), ranks)


def test_the_whole_of_int32_is_budget():
  """A total cost of 2^31 - 1, and a level that is only reached with the very last group."""
  half = 2**30
  space = Space.create(["a", "b"], [[1], [1]], [half, half - 1])
  encoding = Encoding.create(space, np.ones(2), [0.5, 1.0])
  masks = decode(encoding, jnp.array([1.0, 0.0]))
  schedule = Schedule(space, np.array([1, 0]))
  np.testing.assert_array_equal(masks, [schedule.mask(0.5), schedule.mask(1.0)])
  np.testing.assert_array_equal(masks, [[True, True], [True, True]])


def test_keys_of_by_hand():
  keys = keys_of([2, 0, 3, 1])
  assert keys.dtype == np.float32
  np.testing.assert_array_equal(keys, [0.25, 0.75, 0, 0.5])


def test_ranks_of_many_groups_stay_apart():
  order = np.random.default_rng(0).permutation(10**6)
  np.testing.assert_array_equal(np.argsort(keys_of(order)), order)


@pytest.mark.parametrize("order", [[0, 2], [0, 0], [[0, 1]], [-1, 0]])
def test_keys_of_refuses(order):
  with pytest.raises(ValueError, match=r"order: shape .*, not a permutation of 0\.\."):
    keys_of(order)


def example():
  return Space.create(["a", "b"], [[2, 2], [1]], [10, 60])  # costs 1 1 3


def test_scores_are_logarithms_per_cost():
  encoding = Encoding.create(example(), np.array([0.0, 2.0, 3.0]), [0.5])
  lowest, *others = np.asarray(encoding.log_score)
  np.testing.assert_allclose(others, [np.log(2), 0], atol=1e-6)
  assert -100 < lowest < -50
  assert encoding.sizes == (2, 1)
  np.testing.assert_array_equal(encoding.thresholds, [3])  # ceil(0.5 * 5)
  assert not np.asarray(encoding.frozen).any()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"scores": np.ones(2)}, r"scores: shape \(2,\), expected \(3,\)"),
    ({"scores": np.array([1, np.nan, -1])}, "scores: 2 of them are negative or not finite"),
    ({"ratios": []}, "ratios: there are none; expected at least one in 0..1"),
    ({"ratios": [0.5, 1.5]}, r"ratio: 1.5 is not in 0\.\.1"),
    ({"order": [0, 0]}, r"order: its entries are not different groups in 0\.\.2"),
    ({"order": [3]}, r"order: its entries are not different groups in 0\.\.2"),
    ({"order": [2, 0]}, "order: 2 frozen groups reach beyond ratio 0.5; expected the prefix"),
    ({"order": [0], "ratios": [0.5, 0.0]}, "order: 1 frozen groups reach beyond ratio 0.0"),
  ],
)
def test_encoding_refuses(changes, message):
  arguments = {"scores": np.ones(3), "ratios": [0.5]} | changes
  with pytest.raises(ValueError, match=message):
    Encoding.create(example(), **arguments)


def test_a_prefix_may_hold_all_groups():
  """The last of them starts at cost 2, below the budget of 3: so nothing is left, rightly."""
  encoding = Encoding.create(example(), np.ones(3), [0.5], [0, 1, 2])
  assert np.asarray(encoding.frozen).all()
