"""Swin: windows, masks and bias tables against their definitions; refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.models.swin import (
  MASKED,
  PatchMerging,
  SwinBlock,
  SwinTransformer,
  relative_position_index,
  shift_mask,
)


@settings(deadline=None)
@given(st.integers(1, 8))
def test_relative_position_index_is_a_function_of_the_offset(window):
  index = relative_position_index(window)
  assert index.shape == (window**2, window**2)
  offsets = {}
  for query in range(window**2):
    for key in range(window**2):
      row, column = (query // window - key // window, query % window - key % window)
      assert 0 <= index[query, key] < (2 * window - 1) ** 2
      assert offsets.setdefault((row, column), index[query, key]) == index[query, key]
  assert len(set(offsets.values())) == len(offsets) == (2 * window - 1) ** 2


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(2, 4), st.data())
def test_shift_mask_forbids_exactly_the_pairs_across_the_seam(window, count, data):
  shift = data.draw(st.integers(1, window - 1))
  size = window * count
  mask = shift_mask(size, window, shift)
  assert mask.shape == (count**2, window**2, window**2)
  # Where each position of the rolled map was before the roll.
  origin = (np.arange(size) + shift) % size
  for index in range(count**2):
    rows = origin[index // count * window :][:window]
    columns = origin[index % count * window :][:window]
    places = [(r, c) for r in rows for c in columns]
    for query, (row, column) in enumerate(places):
      for key, (other_row, other_column) in enumerate(places):
        near = abs(row - other_row) < window and abs(column - other_column) < window
        assert mask[index, query, key] == (0 if near else MASKED)


def test_windows_are_independent_and_shift_moves_them():
  """A changed pixel changes its own window only; with a shift, the shifted window."""
  for shift in (0, 2):
    block = SwinBlock(
      4, 2, size=8, window=4, shift=shift, mlp_ratio=1, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    changed = x.at[0, 3, 3].add(jnp.arange(4.0))
    moved = np.abs(np.asarray(block(changed) - block(x))[0]).max(-1) > 0
    expected = np.zeros((8, 8), bool)
    expected[shift : shift + 4, shift : shift + 4] = True
    np.testing.assert_array_equal(moved, expected)


def test_merging_takes_the_patch_column_by_column():
  module = PatchMerging(1, dtype=jnp.float32, rngs=nnx.Rngs(0))
  module.norm = lambda x: x
  module.reduction.kernel[...] = jnp.eye(4)[:, 1:3]
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  y = np.asarray(module(x))
  # Entries 1 and 2 of a patch: one row down, then one column right.
  np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6], [12, 14]])
  np.testing.assert_array_equal(y[0, :, :, 1], [[1, 3], [9, 11]])


def test_second_blocks_shift_unless_the_map_is_one_window():
  module = nnx.eval_shape(
    lambda: SwinTransformer(
      width=8, depths=(2, 2), heads=(2, 2), window=4, input_size=32, rngs=nnx.Rngs(0)
    )
  )
  assert [[b.shift for b in stage.blocks] for stage in module.layers] == [[0, 2], [0, 0]]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"heads": (2,)}, r"heads=\(2,\) is refused; accepted: one number for each of depths=\(1, 1\)"),
    ({"heads": (3, 2)}, r"heads\[0\]=3 is refused; accepted: divisors of that stage's width 8"),
    ({"window": 3}, r"window=3 is refused; accepted: divisors of 8, the side of .* stage 0"),
    ({"input_size": 30}, r"input_size=30 is refused; accepted: multiples of patch_size=4"),
    ({"input_size": 28}, r"input_size=28 is refused: .* odd size 7; accepted: multiples of 8"),
    ({"window": 0}, r"window=0 is refused"),
  ],
)
def test_refused_arguments(arguments, message):
  options = {"width": 8, "depths": (1, 1), "heads": (2, 2), "window": 4, "input_size": 32}
  if arguments.get("input_size") == 28:
    options["window"] = 7
  with pytest.raises(ValueError, match=message):
    SwinTransformer(rngs=nnx.Rngs(0), **{**options, **arguments})
