"""Layouts and packed weights against integers in NumPy; patches against whole convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.deployment import layouts, patches
from flexiq_jax.graph import tracing
from flexiq_jax.kernels import Activations, Weights, packing
from flexiq_jax.kernels.windows import unfold
from flexiq_jax.quant import rules
from tests.layers_for_test import CASES, conv, einsum, lowered


def quantized(layer, sizes, per_block, *, signed=True, seed=0, shared=True):
  """A layer of random codes whose groups have the given sizes, and their order."""
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(sizes))
  group = np.empty(sum(sizes), int)
  group[rng.permutation(len(group))] = np.repeat(np.arange(len(sizes)), sizes)
  block = np.empty(len(sizes), int)
  block[order] = np.arange(len(sizes)) // per_block
  shift = rng.integers(0, 5, len(sizes))
  shift = shift[block] if shared else shift
  n = layer.out_channels
  w8 = rng.integers(-127, 128, layer.w_shape)
  e = rng.integers(0, 5, (block.max() + 1, n))[block[group]]  # [C, n]
  canonical = layer.canonical(w8)  # [1, C, window, N]
  w4 = lowered(canonical[0], e[:, None], True, half_even=True)
  q = rules.QLayer(
    w=jnp.asarray(w8, jnp.int8),
    w_scale=jnp.ones(n, jnp.float32),
    x_scale=jnp.float32(1),
    low=rules.Low(
      w=jnp.asarray(layer.native(w4[None]), jnp.int8),
      shift=jnp.asarray(shift[group], jnp.int32),
      group=jnp.asarray(group, jnp.int32),
      bias=jnp.asarray(rng.integers(-999, 999, (len(sizes), n)), jnp.int32),
      block=jnp.asarray(block[group], jnp.int32),
    ),
    signed=signed,
  )
  return q, order


def rows_of(layout, place):
  """Rows of K of a place, position by position of its window."""
  if layout.slides:
    j, at = divmod(place, layout.channels)
    own = range(place % layout.copies, layout.window, layout.copies)  # its positions
    return [j * layout.block + t // layout.copies * layout.channels + at for t in own]
  start = layouts.rows_before(place, layout.channels, layout.window, layout.block)
  return [*range(start, start + layout.window)]


def oracle(layer, q, layout, count, x, dynamic):
  """The sum that a matmul with the packed operands gives, in int64 and one row at a time."""
  weights, low = layouts.pack(layer, q, layout), layout.places[count]
  # Codes of x by row of K, padding codes that do not matter.
  (w8,) = layer.canonical(np.asarray(q.w, np.int64))
  codes, is_low = np.full((layout.rows, 1), 77), np.zeros((layout.rows, 1), bool)
  for place, c in enumerate(layout.order):
    rows = rows_of(layout, place)
    np.testing.assert_array_equal(layout.row_places[rows], place)
    is_low[rows] = place < low
    if c >= 0:
      codes[rows, 0] = x[c]
  offset8, offset4 = (0, 0) if q.signed else (128, 8)
  shift = np.repeat(np.asarray(weights.x_shift), layout.block)[:, None]
  q4 = np.clip((codes + ((1 << shift) >> 1)) >> shift, *((-8, 7) if q.signed else (0, 15)))
  w_shift = np.repeat(np.asarray(weights.w_shift), layout.block, axis=0)
  w4 = np.asarray(packing.unpack(weights.w4), np.int64)
  assert w8.shape[0] == len(x)
  entering = q4 if dynamic else q4 - offset4  # with dynamic shifts the kernel adds the offset
  products = np.where(
    is_low,
    (entering * w4) << (shift + w_shift),
    (codes - offset8) * np.asarray(weights.w8, np.int64),
  )
  counts = [count]
  correction = layouts.corrections(layer, q, layout, counts, dynamic=dynamic)
  return products.sum(axis=0) + correction[0]


@settings(max_examples=15, deadline=None)
@given(
  sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7),
  per_block=st.integers(1, 3),
  granule=st.sampled_from([2, 4, 14]),
  window=st.sampled_from([(), (2, 3)]),
  slides=st.booleans(),
  signed=st.booleans(),
  dynamic=st.booleans(),
  seed=st.integers(0, 99),
)
def test_packed_operands_are_the_layer(
  sizes, per_block, granule, window, slides, signed, dynamic, seed
):
  c = sum(sizes)
  case = einsum("bc,cn->bn", (1, c), (c, 3))
  if window:
    case = conv((1, *window, c), (*window, c, 3))
  layer = case.layer
  q, order = quantized(layer, sizes, per_block, signed=signed, seed=seed)
  layout = layouts.lay_out(layer, q.low, order, granule, slides)
  assert layout.slides <= (slides and bool(window))
  assert layouts.pack(layer, q, layout).taps == (layout.window if layout.slides else 1)
  assert layout.block % granule == 0
  assert layout.rows % layout.block == 0
  assert sorted(layout.order[layout.order >= 0]) == [*np.repeat(range(c), layout.copies)]
  rng = np.random.default_rng(seed)
  x = rng.integers(-127, 128, c) if signed else rng.integers(0, 256, c)
  (w8,), (w4,) = (layer.canonical(np.asarray(w, np.int64)) for w in (q.w, q.low.w))
  shift, group = np.asarray(q.low.shift), np.asarray(q.low.group)
  for count in range(len(sizes) + 1):
    mask = np.isin(group, order[:count])
    low = lowered(x, shift, signed, half_even=False)
    truth = (np.where(mask, low, x)[:, None, None] * np.where(mask[:, None, None], w4, w8)).sum(
      axis=(0, 1)
    )
    truth = truth + np.asarray(q.low.bias, np.int64)[order[:count]].sum(axis=0)
    np.testing.assert_array_equal(oracle(layer, q, layout, count, x, dynamic), truth)
    # Groups in 4 bits are exactly the channels before the boundary.
    before = layout.order[: layout.places[count]]
    assert set(before[before >= 0]) == set(np.flatnonzero(mask))


def test_boundaries_at_blocks_leave_no_padding_behind():
  layer = einsum("bc,cn->bn", (1, 10), (10, 3)).layer
  q, order = quantized(layer, [4, 4, 2], 1)
  layout = layouts.lay_out(layer, q.low, order, 8)
  assert layout.channels == layout.block == 8
  assert layout.places.tolist() == [0, 8, 16, 24]
  assert (layout.order < 0).sum() == 24 - 10


def test_outputs_take_another_layers_order():
  layer = CASES["convolution"].layer
  q, order = quantized(layer, [2, 3], 1, signed=False)
  layout = layouts.lay_out(layer, q.low, order)
  outputs = np.array([2, -1, 0, 3, 1, -1])
  whole, picked = layouts.pack(layer, q, layout), layouts.pack(layer, q, layout, outputs)
  for name in ("w8", "w_shift"):
    a, b = np.asarray(getattr(whole, name)), np.asarray(getattr(picked, name))
    np.testing.assert_array_equal(b[:, outputs >= 0], a[:, outputs[outputs >= 0]])
    assert not b[:, outputs < 0].any()
  a = layouts.corrections(layer, q, layout, [0, 1, 2])
  b = layouts.corrections(layer, q, layout, [0, 1, 2], outputs)
  np.testing.assert_array_equal(b, np.where(outputs < 0, 0, a[:, outputs]))


def test_refusals():
  layer = einsum("bc,cn->bn", (1, 8), (8, 3)).layer
  good, places = quantized(layer, [2] * 4, 2)
  q, order = quantized(layer, [2] * 4, 2, shared=False, seed=3)
  layout = layouts.lay_out(layer, q.low, order)
  with pytest.raises(ValueError, match=r"shifts differ within a shift block; .*groups.shift_block"):
    layouts.pack(layer, q, layout)
  with pytest.raises(ValueError, match="boundary at group 5 of 4"):
    layouts.corrections(layer, good, layouts.lay_out(layer, good.low, places), [5])
  with pytest.raises(ValueError, match="granule: 3; a positive even"):
    layouts.lay_out(layer, q.low, order, 3)
  with pytest.raises(ValueError, match="do not lie next to each other"):
    layouts.lay_out(layer, q.low, order[[0, 2, 1, 3]])
  with pytest.raises(ValueError, match="no 4-bit side"):
    layouts.pack(layer, dataclasses.replace(q, low=None), layout)
  grouped = CASES["grouped"].layer
  with pytest.raises(ValueError, match="2 contraction groups; 1 is accepted"):
    layouts.lay_out(grouped, q.low, order)
  halves = dataclasses.replace(q.low, block=jnp.arange(8, dtype=jnp.int32))
  with pytest.raises(ValueError, match="a channel group lies in two shift blocks"):
    layouts.lay_out(layer, halves, order)
  # A value that is no 4-bit code at the shift that its block and output need.
  wide = np.asarray(good.low.w).copy()
  wide[:2] = [[112], [3]]
  low = dataclasses.replace(good.low, w=jnp.asarray(wide), block=jnp.zeros(8, jnp.int32))
  low = dataclasses.replace(low, shift=jnp.zeros(8, jnp.int32))
  with pytest.raises(ValueError, match="that no 4-bit codes have"):
    layouts.pack(layer, good.replace(low=low), layouts.lay_out(layer, low, places))


MATMULS = [n for n, case in CASES.items() if case.layer.groups == 1]


@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("fill", [0, 7])
def test_rows_times_weights_is_the_contraction(name, fill):
  case = CASES[name]
  params = {"w": jax.ShapeDtypeStruct(case.w, jnp.float32)}
  traced = tracing.trace(case.apply, params, jax.ShapeDtypeStruct(case.x, jnp.float32))
  ((number, layer),) = traced.layers.items()
  eqn = traced.jaxpr.jaxpr.eqns[number]
  rng = np.random.default_rng(0)
  x, w = rng.integers(-9, 10, case.x), rng.integers(-9, 10, case.w)
  assert patches.supported(layer, eqn)
  codes = patches.channels_last(layer, eqn.params, jnp.asarray(x + fill, jnp.int32))
  window = int(np.prod(layer.window))
  block = 2 * window + 3
  if layer.in_channels % 2:  # a padded place of zero weights
    codes = jnp.pad(codes, ((0, 0),) * (codes.ndim - 1) + ((0, 1),))
  places = codes.shape[-1]
  rows = patches.rows(layer, eqn.params, codes, block, 2, jnp.full(places, fill))
  (canonical,) = layer.canonical(w)
  canonical = np.pad(canonical, ((0, places - layer.in_channels), (0, 0), (0, 0)))
  packed = np.pad(canonical.reshape(-1, 2 * window, layer.out_channels), ((0, 0), (0, 3), (0, 0)))
  packed = packed.reshape(-1, layer.out_channels)
  # Codes that lie `fill` too high, borders included, are corrected by one constant per output.
  y = np.asarray(rows) @ packed - fill * packed.sum(axis=0)
  exact = case.exact(x, w)
  np.testing.assert_array_equal(patches.result(layer, eqn.params, y, exact.shape), exact)


SAME = {
  "square": conv((2, 5, 4, 3), (3, 3, 3, 2), padding=((1, 1), (1, 1))),
  "dilated": conv((1, 5, 6, 3), (3, 3, 3, 2), padding=((2, 2), (2, 2)), dilation=2),
  "one-sided": conv((1, 4, 4, 3), (2, 3, 3, 2), padding=((1, 0), (0, 2))),
  "channels first": conv((2, 3, 5, 4), (3, 3, 3, 2), padding=((1, 1), (1, 1)), layout="NCHW"),
}
OTHERS = {
  "stride 2": conv((1, 4, 4, 3), (3, 3, 3, 2), padding=((1, 1), (1, 1)), stride=2),
  "smaller result": conv((1, 4, 4, 3), (3, 3, 3, 2)),
  "one pixel": conv((1, 4, 4, 3), (1, 1, 3, 2)),
  "groups": conv((1, 4, 4, 4), (3, 3, 2, 4), padding=((1, 1), (1, 1)), groups=2),
  "dense": CASES["dense"],
}


def window_of(case):
  params = {"w": jax.ShapeDtypeStruct(case.w, jnp.float32)}
  traced = tracing.trace(case.apply, params, jax.ShapeDtypeStruct(case.x, jnp.float32))
  ((number, layer),) = traced.layers.items()
  eqn = traced.jaxpr.jaxpr.eqns[number]
  return layer, eqn.params, patches.window(layer, eqn.params, case.x)


@pytest.mark.parametrize("name", SAME)
def test_windows_slide_over_pixels(name):
  """Positions as they are unfolded, times weights position by position: the convolution."""
  case, rng = SAME[name], np.random.default_rng(0)
  layer, params, window = window_of(case)
  x, w = rng.integers(-9, 10, case.x), rng.integers(-9, 10, case.w)
  rows = np.asarray(patches.channels_last(layer, params, jnp.asarray(x)))
  rows = rows.reshape(-1, rows.shape[-1])
  operand = Activations(
    x8=jnp.asarray(rows, jnp.int8), x4=jnp.zeros(rows.shape, jnp.int4), boundary=jnp.int32(0)
  )
  (canonical,) = layer.canonical(w)  # [C, window, N]
  taps, n = canonical.shape[1:]
  w8 = canonical.swapaxes(0, 1).reshape(-1, n)
  weights = Weights(
    w8=jnp.asarray(w8, jnp.int8),
    w4=jnp.zeros((len(w8) // 2, n), jnp.int8),
    x_shift=jnp.zeros(1, jnp.int32),
    w_shift=jnp.zeros((1, n), jnp.int32),
    block=len(w8),
    taps=taps,
  )
  y = np.asarray(unfold(operand, weights, window).x8, np.int64) @ w8
  exact = case.exact(x, w)
  np.testing.assert_array_equal(patches.result(layer, params, y, exact.shape), exact)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_have_no_window(name):
  assert window_of(OTHERS[name])[2] is None


def test_what_is_no_single_matmul_is_told():
  for name in ("grouped", "depthwise", "dense, shared dimension"):
    case = CASES[name]
    params = {"w": jax.ShapeDtypeStruct(case.w, jnp.float32)}
    traced = tracing.trace(case.apply, params, jax.ShapeDtypeStruct(case.x, jnp.float32))
    ((number, layer),) = traced.layers.items()
    assert not patches.supported(layer, traced.jaxpr.jaxpr.eqns[number])
