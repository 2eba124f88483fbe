"""Ties of groups: one layer's neighbours, and the ways there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search.gram.ties import Ties


@st.composite
def problems(draw):
  sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
  channels = [[draw(st.integers(2, 4))] * size for size in sizes]
  for groups in channels:
    groups[-1] = draw(st.integers(1, groups[0]))  # the last group may be short
  macs = [draw(st.sampled_from([6, 10, 15])) for _ in sizes]
  space = Space.create([f"layer{i}" for i in range(len(sizes))], channels, macs)
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  return space, rng.lognormal(size=space.total), rng


@given(problems(), st.integers(2, 40))
def test_ties_are_neighbours_of_one_layer(problem, limit):
  space, scores, rng = problem
  ties = Ties(space, scores, limit)
  members = [np.flatnonzero(ties.of == tie) for tie in range(ties.space.total)]
  assert sum(map(len, members)) == space.total
  assert ties.space.total <= max(limit, len(space.sizes))
  assert max(map(len, members)) == ties.size
  if ties.size > 1:  # one less would have been too little
    assert sum(-(-j // (ties.size - 1)) for j in space.sizes) > limit
  # Cost and channels of a tie are those of its groups.
  for tie, groups in enumerate(members):
    assert set(space.layer[groups]) == {ties.space.layer[tie]}
    mine = ties.space.cost[tie] * ties.space.unit, ties.space.channels[tie]
    assert mine == (space.cost[groups].sum() * space.unit, space.channels[groups].sum())
  # In a layer no group is better than one of a tie before its own.
  ratio = scores / space.cost
  for tie in range(1, ties.space.total):
    if ties.size > 1 and ties.space.layer[tie] == ties.space.layer[tie - 1]:
      assert ratio[members[tie - 1]].max() <= ratio[members[tie]].min()

  masks = rng.random((3, ties.space.total)) < 0.5
  wide = ties.expand(masks)
  assert wide.shape == (3, space.total)
  for tie, groups in enumerate(members):
    assert (wide[:, groups] == masks[:, tie, None]).all()
  effects = rng.integers(-9, 9, (2, space.total)).astype(np.float32)
  expected = np.stack([effects[:, groups].sum(axis=1) for groups in members], axis=1)
  np.testing.assert_array_equal(ties.sum(effects), expected)

  order = rng.permutation(ties.space.total)
  fine = ties.fine(order)
  np.testing.assert_array_equal(ties.of[fine], np.repeat(order, [len(members[t]) for t in order]))
  np.testing.assert_array_equal(ties.coarse(fine), order)
  for tie in range(ties.space.total):
    assert (np.diff(ratio[fine[ties.of[fine] == tie]]) >= 0).all()
  # Where the budget ends between ties, both orders have the same mask there.
  cost = ties.space.cost[order]
  share = cost[: len(cost) // 2 + 1].sum() / cost.sum()
  coarse_mask = Schedule(ties.space, order).mask(share)
  fine_mask = Schedule(space, fine).mask(share)
  assert not (fine_mask & ~ties.expand(coarse_mask)).any()


def test_nothing_is_tied_without_need():
  space = Space.create(["a", "b"], [[2, 2, 1], [3, 3]], [4, 5])
  ties = Ties(space, np.arange(5.0), 5)
  assert ties.size == 1
  assert ties.space is space
  effects = np.ones((2, 5))
  assert ties.sum(effects) is effects
  np.testing.assert_array_equal(ties.fine(np.array([3, 1, 0, 2, 4])), [3, 1, 0, 2, 4])
  assert Ties(space, np.arange(5.0), 4).size == 2


@pytest.mark.parametrize(("limit", "size"), [(4, 2), (3, 2), (2, 3), (1, 3)])
def test_a_tie_of_each_layer_at_least(limit, size):
  space = Space.create(["a", "b"], [[2, 2, 1], [3, 3]], [4, 5])
  assert Ties(space, np.arange(5.0), limit).size == size
