"""Schedules: the budget laws on random spaces, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.orders.schedule import threshold


@st.composite
def spaces(draw):
  layers = draw(st.integers(1, 5))
  channels = [
    draw(st.lists(st.integers(1, 40), min_size=draw(st.integers(0, 1)) or (i == 0), max_size=6))
    for i in range(layers)
  ]
  macs = draw(st.lists(st.integers(1, 5000), min_size=layers, max_size=layers))
  return Space.create([f"layer{i}" for i in range(layers)], channels, macs)


@st.composite
def schedules(draw):
  space = draw(spaces())
  return Schedule(space, np.array(draw(st.permutations(range(space.total)))))


ratios = st.one_of(
  st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 1000).map(lambda i: i / 1000)
)


@settings(deadline=None)
@given(schedules(), ratios)
def test_ratio_is_reached_and_exceeded_by_less_than_one_group(schedule, ratio):
  space = schedule.space
  total = int(space.cost.sum())
  wanted = Fraction(round(ratio * 1000), 1000) * total
  mask = schedule.mask(ratio)
  spent = int(space.cost[mask].sum())
  chosen = [g for g in schedule.order if mask[g]]
  assert chosen == list(schedule.order[: len(chosen)])  # a prefix of the order
  assert spent >= wanted
  if chosen:
    assert spent - int(space.cost[chosen[-1]]) < wanted  # not without the last group
  assert schedule.prefix(ratio) == len(chosen)
  assert schedule.mac_share(ratio) == pytest.approx(spent / total)
  assert schedule.channel_share(ratio) == pytest.approx(
    sum(int(space.channels[g]) for g in chosen) / int(space.channels.sum())
  )


@settings(deadline=None)
@given(schedules())
def test_none_at_zero_and_all_at_one(schedule):
  assert not schedule.mask(0.0).any()
  assert schedule.mask(1.0).all()
  assert (schedule.mac_share(0.0), schedule.mac_share(1.0)) == (0, 1)


@settings(deadline=None)
@given(schedules(), ratios, ratios)
def test_masks_are_nested(schedule, one, other):
  low, high = sorted((one, other))
  assert np.all(schedule.mask(low) <= schedule.mask(high))


@settings(deadline=None)
@given(schedules(), ratios)
def test_boundaries_and_layer_order_say_what_the_mask_says(schedule, ratio):
  boundaries, order = schedule.boundaries(ratio), schedule.layer_order()
  masks = schedule.masks(ratio)
  assert list(masks) == list(boundaries) == list(order) == list(schedule.space.names)
  for name, mask in masks.items():
    assert sorted(order[name]) == list(range(len(mask)))
    from_boundary = np.zeros(len(mask), bool)
    from_boundary[order[name][: boundaries[name]]] = True
    np.testing.assert_array_equal(from_boundary, mask)


def example():
  return Space.create(["a", "b"], [[2, 2], [1]], [10, 60])  # costs 20 20 60


def test_by_hand():
  schedule = Schedule(example(), np.array([1, 2, 0]))
  np.testing.assert_array_equal(schedule.mask(0.2), [False, True, False])
  np.testing.assert_array_equal(schedule.mask(0.21), [False, True, True])
  np.testing.assert_array_equal(schedule.mask(0.8), [False, True, True])
  assert schedule.boundaries(0.8) == {"a": 1, "b": 1}
  assert schedule.mac_share(0.21) == pytest.approx(0.8)
  assert schedule.channel_share(0.21) == pytest.approx(0.6)
  np.testing.assert_array_equal(schedule.layer_order()["a"], [1, 0])
  np.testing.assert_array_equal(schedule.layer_order()["b"], [0])


def test_decimal_ratios_mean_what_they_say():
  """0.1 in binary is a little over a tenth; ten groups at 0.1 are still one, not two."""
  space = Space.create(["a"], [[1] * 10], [7])
  schedule = Schedule(space, np.arange(10))
  assert [schedule.prefix(i / 10) for i in range(11)] == list(range(11))
  assert schedule.prefix(0.1 + 0.2) == 3
  assert threshold(space, 0.3) == 3


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3], []])
def test_order_must_be_a_permutation(order):
  with pytest.raises(
    ValueError, match=r"order: \d entries, not a permutation of the 3 channel groups"
  ):
    Schedule(example(), np.array(order, int))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_ratio_outside_of_0_to_1(ratio):
  schedule = Schedule(example(), np.arange(3))
  for read in (schedule.mask, schedule.boundaries, schedule.mac_share, schedule.prefix):
    with pytest.raises(ValueError, match=rf"ratio: {ratio} is not in 0\.\.1"):
      read(ratio)
