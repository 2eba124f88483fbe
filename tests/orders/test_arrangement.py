"""Layouts: blocks along the schedule order, and sorting that changes no level's mask."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.orders import Schedule, Space, shift_blocks, sorted_within


@st.composite
def schedules(draw):
  """Layers whose last group is short or not, an order, and a shift for each group."""
  layers = draw(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9)), min_size=1)
  )
  space = Space.create(
    [f"layer{i}" for i in range(len(layers))],
    [[4] * full + [last] for full, last, _ in layers],
    [macs for *_, macs in layers],
  )
  order = np.array(draw(st.permutations(range(space.total))))
  shifts = np.array(
    draw(st.lists(st.integers(0, 4), min_size=space.total, max_size=space.total)), np.int32
  )
  return Schedule(space, order), shifts


LEVELS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0]), max_size=5)


@given(schedules(), LEVELS)
def test_masks_at_the_levels_and_sizes_at_all_ratios_stay(made, levels):
  before, shifts = made
  after = sorted_within(before, levels, shifts)
  for level in levels:
    np.testing.assert_array_equal(after.mask(level), before.mask(level))
  for ratio in np.linspace(0, 1, 21):
    assert after.prefix(ratio) == before.prefix(ratio)
    assert after.boundaries(ratio) == before.boundaries(ratio)
    assert after.mac_share(ratio) == before.mac_share(ratio)


@given(schedules(), LEVELS)
def test_between_levels_groups_of_a_layer_are_sorted(made, levels):
  schedule, shifts = made
  after = sorted_within(schedule, levels, shifts)
  space = schedule.space
  cuts = sorted({0, space.total, *(schedule.prefix(level) for level in levels)})
  for start, end in itertools.pairwise(cuts):
    runs = collections.defaultdict(list)
    for i in after.order[start:end]:
      runs[space.layer[i], space.cost[i]].append((shifts[i], i))
    assert all(run == sorted(run) for run in runs.values())
  again = sorted_within(after, levels, shifts)
  np.testing.assert_array_equal(again.order, after.order)


def test_without_levels_a_layer_is_sorted_from_end_to_end():
  space = Space.create(["a", "b"], [[4, 4, 4], [4, 4, 2]], [1, 1])
  schedule = Schedule(space, np.array([5, 0, 3, 1, 4, 2]))
  after = sorted_within(schedule, [], np.array([3, 1, 2, 4, 0, 0]))
  # The short group 5 stays in front; 3 and 4 change places, and so do the groups of `a`.
  assert after.order.tolist() == [5, 1, 4, 2, 3, 0]


@given(st.permutations(range(11)), st.integers(1, 13))
def test_blocks_are_runs_of_the_layout(layout, size):
  blocks = shift_blocks(np.array(layout), size)
  assert blocks.dtype == np.int32
  for place, group in enumerate(layout):
    assert blocks[group] == place // size


@pytest.mark.parametrize("levels", [(0.5,), (0.5, 0.5), (0.0, 0.5, 1.0)])
def test_levels_may_repeat_and_hold_the_ends(levels):
  space = Space.create(["a"], [[4] * 4], [1])
  after = sorted_within(Schedule(space, np.array([3, 0, 2, 1])), levels, np.array([0, 1, 2, 3]))
  assert after.order.tolist() == [0, 3, 1, 2]
