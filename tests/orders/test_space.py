"""The search space: flat numbering, exact integer costs, refused arguments."""

import numpy as np
import pytest

from flexiq_jax.orders import Space


def space():
  return Space.create(["a", "b", "c"], [[4, 4, 2], [], [8, 1]], [90, 7, 30])


def test_flat_order_and_costs():
  s = space()
  assert (s.names, s.sizes, s.total) == (("a", "b", "c"), (3, 0, 2), 5)
  np.testing.assert_array_equal(s.layer, [0, 0, 0, 2, 2])
  np.testing.assert_array_equal(s.channels, [4, 4, 2, 8, 1])
  assert s.unit == 30  # of 360 360 180 240 30 MACs
  np.testing.assert_array_equal(s.cost, [12, 12, 6, 8, 1])


def test_split_join_and_index_agree():
  s = space()
  flat = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
  parts = s.split(flat)
  assert {name: list(v) for name, v in parts.items()} == {"a": [1, 2, 3], "b": [], "c": [4, 5]}
  np.testing.assert_array_equal(s.join(parts), flat)
  np.testing.assert_array_equal(s.join(dict(reversed(parts.items()))), flat)
  assert [s.index("a", 2), s.index("c", 0), s.index("c", 1)] == [2, 3, 4]


@pytest.mark.parametrize(
  ("name", "group", "message"),
  [
    ("d", 0, "name: no layer 'd' in this space"),
    ("a", 3, r"group: 3 is not in 0\.\.2, layer a"),
    ("c", -1, r"group: -1 is not in 0\.\.1, layer c"),
  ],
)
def test_index_refuses(name, group, message):
  with pytest.raises(ValueError, match=message):
    space().index(name, group)


def test_join_refuses_what_does_not_fit():
  s = space()
  parts = s.split(np.arange(5))
  with pytest.raises(ValueError, match="per_layer: layer c has 1 values for 2 groups"):
    s.join({**parts, "c": np.zeros(1)})
  with pytest.raises(ValueError, match="per_layer: layer b is missing"):
    s.join({name: parts[name] for name in ("a", "c")})


def test_costs_beyond_int32_are_refused():
  largest = 2**31 - 1
  fits = Space.create(["a"], [[1, 1]], [largest])  # the unit is taken out first
  np.testing.assert_array_equal(fits.cost, [1, 1])
  fits = Space.create(["a", "b"], [[1], [1]], [largest - 1, 1])
  assert fits.cost.sum() == largest
  with pytest.raises(ValueError, match=f"macs_per_channel: the total cost {2**31} .* over int32"):
    Space.create(["a", "b"], [[1], [1]], [largest, 1])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((["a"], [[]], [5]), "channels: no channel group may go to 4 bits"),
    (([], [], []), "channels: no channel group may go to 4 bits"),
    ((["a", "b"], [[1]], [5]), "names, channels, macs_per_channel: of 2, 1 and 1 layers"),
    ((["a", "a"], [[1], [1]], [5, 5]), "names: 'a' is there more than once"),
    ((["a"], [[2, 0]], [5]), "layer a has 5 MACs a channel and a group of 0 channels"),
    ((["a"], [[2, 1]], [0]), "layer a has 0 MACs a channel"),
  ],
)
def test_refused_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    Space.create(*arguments)
