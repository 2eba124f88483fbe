"""Channel groups, shifts, lowered weights and bias corrections, against loops over channels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph, orders
from flexiq_jax.quant import calibration, grouping, lowering, rules
from flexiq_jax.quant.grouping import LowSettings
from tests.layers_for_test import KINDS, conv, lowered

LAYERS = {**KINDS, "convolution": conv((2, 30, 30, 5), (3, 3, 5, 4))}


@dataclasses.dataclass
class Made:
  """A quantized layer, inputs that fit it, and the histogram of their codes."""

  layer: graph.Layer
  q: rules.QLayer
  x: np.ndarray
  x8: np.ndarray  # [rows, C] codes
  counts: np.ndarray


@functools.cache
def made(name, signed=True):
  """Channels of very different ranges, and weights with outliers."""
  case, rng = LAYERS[name], np.random.default_rng(3)
  layer = case.layer
  loud = 2.0 ** rng.integers(-4, 1, layer.in_channels)
  x = rng.standard_t(4, case.x) * np.asarray(layer.x_vector(loud, case.x))
  x = x if signed else np.abs(x)
  w = rng.standard_t(3, case.w) * np.asarray(layer.w_vector(jnp.asarray(loud[::-1].copy())))
  scale = float(np.abs(x).max()) / (127 if signed else 255)
  q = calibration.quantize_layer(layer, w, scale, signed, calibration.RangeSettings(weight="max"))
  lo, hi = (-127, 127) if signed else (0, 255)
  x8 = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), lo, hi).astype(np.int64)
  x8 = np.asarray(layer.channels_last(x8)).reshape(-1, layer.in_channels)
  counts = np.stack([np.bincount(c + (128 if signed else 0), minlength=256) for c in x8.T])
  return Made(layer, q, x.astype(np.float32), x8, counts)


def group(m, **changes):
  return grouping.group_channels(m.layer, m.q, m.counts, LowSettings(**changes))


def weights_of(m):
  """`[C, K, N/g]` int64 and the scales `[C, N/g]`, by loops."""
  w = np.asarray(m.layer.canonical(np.asarray(m.q.w))).astype(np.int64)
  g, inner, _, n = w.shape
  scale = np.asarray(m.q.w_scale, np.float64).reshape(g, n)
  rows = [(w[i, c], scale[i]) for i in range(g) for c in range(inner)]
  return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])


def best_shift(q, signed, half_even):
  errors = [np.square(q - lowered(q, e, signed, half_even)).sum() for e in range(5)]
  return int(np.argmin(errors))


def range_shift(q, signed):
  return max(0, int(np.abs(q).max()).bit_length() - (3 if signed else 4))


@settings(deadline=None, max_examples=25)
@given(
  st.sampled_from(sorted(LAYERS)),
  st.integers(1, 14),
  st.booleans(),
  st.sampled_from(["mse", "range"]),
)
def test_groups_hold_each_channel_once(name, size, sort, method):
  m = made(name)
  cut = group(m, group_size=size, sort=sort, activation_shift=method)
  c = m.layer.in_channels
  assert sorted(np.concatenate(cut.channels)) == list(range(c))
  full, rest = divmod(c, size)
  assert [len(g) for g in cut.channels] == [size] * full + ([rest] if rest else [])
  assert len(cut.x_shift) == len(cut.channels) == -(-c // size)
  if not sort:
    np.testing.assert_array_equal(np.concatenate(cut.channels), np.arange(c))
  else:  # by the shift that each channel would choose alone
    order = np.concatenate(cut.channels)
    alone = best_shift if method == "mse" else range_shift
    args = (True, False) if method == "mse" else (True,)
    shifts = [alone(m.x8[:, i], *args) for i in order]
    assert shifts == sorted(shifts)
    assert np.all(np.diff(cut.x_shift) >= 0)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", LAYERS)
def test_shifts_and_statistics_are_those_of_the_groups_codes(name, signed):
  m = made(name, signed)
  w, steps = weights_of(m)
  by_method = {
    method: group(m, group_size=3, activation_shift=method, weight_shift=method, sort=False)
    for method in ("mse", "range", "naive")
  }
  per_output = group(m, group_size=3, sort=False, weight_shift_per="output")
  by_range = group(m, group_size=3, sort=False, weight_shift_per="output", weight_shift="range")
  cut = by_method["mse"]
  for j, channels in enumerate(cut.channels):
    x_codes, w_codes = m.x8[:, channels], w[channels]
    assert cut.x_shift[j] == best_shift(x_codes, signed, half_even=False)
    assert cut.w_shift[j] == best_shift(w_codes, True, half_even=True)
    assert by_method["range"].x_shift[j] == range_shift(x_codes, signed)
    assert by_method["range"].w_shift[j] == range_shift(w_codes, True)
    assert by_method["naive"].x_shift[j] == by_method["naive"].w_shift[j] == 4
    for n in range(w.shape[-1]):
      assert per_output.w_shift[j, n] == best_shift(w_codes[:, :, n], True, half_even=True)
      assert by_range.w_shift[j, n] == range_shift(w_codes[:, :, n], True)
    assert cut.x_top[j] == np.abs(x_codes).max()
    np.testing.assert_array_equal(cut.w_top[j], np.abs(w_codes).max(axis=(0, 1)))
    error = np.square(x_codes - lowered(x_codes, cut.x_shift[j], signed, half_even=False))
    assert cut.x_error[j] == pytest.approx(error.mean(axis=0).sum())
    power = np.square(x_codes.astype(float)).mean(axis=0).sum()
    assert cut.x_power[j] == pytest.approx(power)
    real = w_codes * steps[channels][:, None, :]
    assert cut.w_power[j] == pytest.approx(np.square(real).sum())
    ones = np.broadcast_to(steps[channels][:, None, :], w_codes.shape)
    assert cut.w_step[j] == pytest.approx(np.square(ones).sum())
  x4 = np.concatenate(
    [lowered(m.x8[:, c], e, signed, False) for c, e in zip(cut.channels, cut.x_shift, strict=True)],
    axis=1,
  )
  # Held to four decimals, as recipes have them.
  np.testing.assert_array_equal(cut.x_mean, m.x8.mean(axis=0).round(4))
  np.testing.assert_array_equal(cut.low_mean, x4.mean(axis=0).round(4))


@pytest.mark.parametrize("per", ["group", "output"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_lowered_by_their_groups_shift(name, per):
  m = made(name)
  low_settings = LowSettings(group_size=3, weight_shift_per=per)
  cut = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  low = grouping.lower(m.layer, m.q, cut, low_settings).low
  w, _ = weights_of(m)
  got = np.asarray(m.layer.canonical(np.asarray(low.w))).reshape(w.shape)
  for j, channels in enumerate(cut.channels):
    e = cut.w_shift[j]  # a number, or one for each output
    np.testing.assert_array_equal(got[channels], lowered(w[channels], e, True, half_even=True))
    np.testing.assert_array_equal(np.asarray(low.group)[channels], j)
    np.testing.assert_array_equal(np.asarray(low.shift)[channels], cut.x_shift[j])
  assert (low.w.shape, low.w.dtype) == (m.layer.w_shape, jnp.int8)
  assert (low.bias.shape, low.bias.dtype) == (
    (len(cut.channels), m.layer.out_channels),
    jnp.int32,
  )


@settings(deadline=None, max_examples=40)
@given(
  st.sampled_from(sorted(LAYERS)),
  st.integers(1, 5),
  st.integers(1, 4),
  st.booleans(),
  st.sampled_from(["mse", "range"]),
  st.sampled_from(["group", "output"]),
  st.randoms(use_true_random=False),
)
def test_groups_of_a_shift_block_share_the_shifts_of_all_its_codes(
  name, size, several, signed, method, per, random
):
  m = made(name, signed)
  low_settings = LowSettings(
    group_size=size,
    shift_block=size * several,
    activation_shift=method,
    weight_shift=method,
    weight_shift_per=per,
  )
  groups = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  layout = np.array(random.sample(range(len(groups.channels)), len(groups.channels)))
  blocks = orders.shift_blocks(
    layout, orders.groups_per_block(groups.channels, low_settings.shift_block)
  )
  cut = grouping.reshift(m.layer, m.q, m.counts, groups.channels, blocks, low_settings)
  low = grouping.lower(m.layer, m.q, cut, low_settings).low
  w, _ = weights_of(m)
  got = np.asarray(m.layer.canonical(np.asarray(low.w))).reshape(w.shape)
  best = best_shift if method == "mse" else lambda q, signed, half_even: range_shift(q, signed)
  for start in range(0, len(layout), several):
    run = layout[start : start + several]
    channels = np.concatenate([groups.channels[j] for j in run])
    assert np.all(np.asarray(low.block)[channels] == start // several)
    e = best(m.x8[:, channels], signed, half_even=False)
    assert np.all(cut.x_shift[run] == e) and np.all(np.asarray(low.shift)[channels] == e)
    x4 = lowered(m.x8[:, channels], e, signed, half_even=False)
    np.testing.assert_allclose(cut.low_mean[channels], x4.mean(axis=0), atol=5.1e-5)
    if per == "group":
      e = best(w[channels], True, half_even=True)
    else:
      e = np.array([best(w[channels][:, :, n], True, half_even=True) for n in range(w.shape[2])])
    assert np.all(cut.w_shift[run] == e)
    np.testing.assert_array_equal(got[channels], lowered(w[channels], e, True, half_even=True))


def test_shifts_that_tie_but_for_rounding_are_the_smaller_ones():
  errors = np.array([[3.0, 0.3, 0.1 + 0.2, 0.3, 9.0], [0.1 + 0.2, 0.3, 1.0, 1.0, 1.0]])
  assert 0.3 < 0.1 + 0.2
  np.testing.assert_array_equal(lowering.choose_shifts("mse", errors[:, 0], errors, True), [1, 0])


@pytest.mark.parametrize("block", [0, 1, 2, 4], ids="S={}".format)
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_no_larger_than_groups_change_no_shift(name, block):
  m = made(name)
  low_settings = LowSettings(group_size=4, shift_block=block, weight_shift_per="output")
  own = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  layout = np.random.default_rng(0).permutation(len(own.channels))
  blocks = orders.shift_blocks(
    layout, orders.groups_per_block(own.channels, low_settings.shift_block)
  )
  cut = grouping.reshift(m.layer, m.q, m.counts, own.channels, blocks, low_settings)
  for field in dataclasses.fields(cut):
    if field.name not in ("channels", "block"):
      np.testing.assert_array_equal(getattr(cut, field.name), getattr(own, field.name))
  lows = [grouping.lower(m.layer, m.q, c, low_settings).low for c in (own, cut)]
  for field in ("w", "shift", "group", "bias"):
    np.testing.assert_array_equal(getattr(lows[0], field), getattr(lows[1], field))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_error_falls_with_finer_groups_and_chosen_shifts(size):
  """Sharing a shift costs accuracy, and least squares beats the range."""
  m = made("dense")
  error = lambda cut: sum(
    np.square(m.x8[:, c] - lowered(m.x8[:, c], e, True, False)).sum()
    for c, e in zip(cut.channels, cut.x_shift, strict=True)
  )
  mse = error(group(m, group_size=size))
  by_range = error(group(m, group_size=size, activation_shift="range"))
  naive = error(group(m, group_size=size, activation_shift="naive"))
  assert mse <= by_range <= naive
  assert mse < naive or size == 100
  assert error(group(m, group_size=1)) <= mse


@functools.cache
def outputs(name, signed, bias_correction):
  """Mean over examples and positions of mixed minus 8-bit, for some masks; [masks, N]."""
  case, m = LAYERS[name], made(name, signed)
  low_settings = LowSettings(group_size=3, bias_correction=bias_correction)
  cut = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  q = grouping.lower(m.layer, m.q, cut, low_settings)
  masks = np.stack([np.arange(len(cut.channels)) == 0, np.ones(len(cut.channels), bool)])
  params = {"w": jnp.zeros(case.w)}

  def difference(mask):
    rule = rules.mixed_rule({"w": q}, {"w": mask})
    y8 = graph.with_rule(case.apply, rules.int8_rule({"w": q}))(params, m.x)
    return graph.with_rule(case.apply, rule)(params, m.x) - y8, y8

  diff, y8 = jax.jit(jax.vmap(difference))(masks)
  rest = tuple(1 + d for d in range(m.layer.y_ndim) if d not in m.layer.y_dims)
  mean = np.asarray(diff, np.float64).mean(axis=rest).reshape(2, -1)
  step = float(np.max(q.w_scale * q.x_scale))  # corrections are rounded to it, once for each group
  return mean, float(np.std(y8)), step * len(cut.channels)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_takes_the_mean_error_out(name, signed):
  before, size, rounding = outputs(name, signed, False)
  after, *_ = outputs(name, signed, True)
  assert np.abs(before).max() > 1e-3 * size
  if name == "convolution":  # border pixels are in fewer windows: the means differ a little
    assert np.abs(after).max() < (0.2 * np.abs(before).max() if not signed else 0.05 * size)
  else:
    assert np.abs(after).max() < 2e-5 * size + 0.5 * rounding


def test_without_bias_correction_there_is_none():
  m = made("grouped")
  low_settings = LowSettings(bias_correction=False)
  cut = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  assert not np.any(grouping.lower(m.layer, m.q, cut, low_settings).low.bias)


def test_bias_of_a_grouped_layer_is_on_the_outputs_that_read_the_channels():
  """With groups of one channel, no other output may be corrected."""
  for name in ("grouped", "shared", "depthwise"):
    m = made(name)
    low_settings = LowSettings(group_size=1, sort=False)
    cut = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
    bias = np.asarray(grouping.lower(m.layer, m.q, cut, low_settings).low.bias)
    inner = m.layer.in_channels // m.layer.groups
    outer = m.layer.out_channels // m.layer.groups
    reads = np.arange(m.layer.in_channels)[:, None] // inner == np.arange(bias.shape[1]) // outer
    assert np.all(bias[~reads] == 0)
    assert np.any(bias[reads] != 0)


def test_channels_never_seen_are_lossless():
  m = made("dense")
  cut = grouping.group_channels(m.layer, m.q, np.zeros_like(m.counts), LowSettings())
  assert not np.any(cut.x_shift)
  assert not np.any(cut.x_mean) and not np.any(cut.low_mean) and not np.any(cut.x_top)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize(
  ("size", "sizes"), [(2, [4, 4, 4]), (4, [4, 4, 4]), (5, [8, 4]), (8, [8, 4]), (12, [12])]
)
def test_groups_of_whole_runs(sort, size, sizes):
  """12 channels in runs of four: as many runs a group as reach its size."""
  m = made("dense", True)
  counts = np.random.default_rng(0).permuted(np.resize(m.counts, (12, 256)), axis=1)
  layer = dataclasses.replace(m.layer, in_channels=12, w_shape=(12, m.layer.out_channels))
  q = dataclasses.replace(m.q, w=np.resize(np.asarray(m.q.w), layer.w_shape))
  low_settings = LowSettings(group_size=size, shift_block=2 * size, sort=sort)
  cut = grouping.group_channels(layer, q, counts, low_settings, run=4)
  assert [len(c) for c in cut.channels] == sizes
  runs = np.concatenate(cut.channels).reshape(-1, 4)
  assert sorted(runs[:, 0]) == [0, 4, 8]
  np.testing.assert_array_equal(runs, runs[:, :1] + np.arange(4))
  blocks = orders.groups_per_block(cut.channels, low_settings.shift_block)
  assert blocks == max(1, 2 * size // sizes[0])
  with pytest.raises(ValueError, match="run: 5; a divisor of the 12 channels of layer"):
    grouping.group_channels(layer, q, counts, low_settings, run=5)


def test_histograms_and_groups_of_another_layer_are_refused():
  m = made("dense")
  with pytest.raises(
    ValueError, match=r"counts: shape \(10, 256\) for layer w, expected \(11, 256"
  ):
    grouping.group_channels(m.layer, m.q, m.counts[1:], LowSettings())
  cut = group(m)
  for channels in (cut.channels[1:], (*cut.channels, cut.channels[0])):
    wrong = dataclasses.replace(cut, channels=channels)
    with pytest.raises(ValueError, match="cut: its groups do not hold each of the 11 channels"):
      grouping.lower(m.layer, m.q, wrong, LowSettings())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"group_size": 0}, "group_size: 0 is not a positive number of channels"),
    ({"shift_block": 6}, r"shift_block: 6; 0, a multiple or a divisor of group_size \(4\)"),
    ({"shift_block": 3}, "shift_block: 3; 0, a multiple"),
    ({"shift_block": -4}, "shift_block: -4; 0, a multiple"),
    ({"activation_shift": "max"}, "activation_shift: 'max' is not one of range, mse, naive"),
    ({"weight_shift": "max"}, "weight_shift: 'max' is not one of range, mse, naive"),
    ({"weight_shift_per": "layer"}, "weight_shift_per: 'layer' is not one of group, output"),
  ],
)
def test_refused_settings(arguments, message):
  with pytest.raises(ValueError, match=message):
    LowSettings(**arguments)


@pytest.mark.parametrize("name", ["dense", "grouped", "convolution"])
def test_closed_form_scores_rank_groups_as_their_errors_do(name):
  """Ranges alone know little, but which group is bad they must know."""
  case, m = LAYERS[name], made(name)
  low_settings = LowSettings(
    group_size=1, activation_shift="range", weight_shift="range", bias_correction=False
  )
  cut = grouping.group_channels(m.layer, m.q, m.counts, low_settings)
  q = grouping.lower(m.layer, m.q, cut, low_settings)
  params = {"w": jnp.zeros(case.w)}
  errors = calibration.observe_errors(case.apply, params, {"w": q}, [m.x])
  space = orders.Space.create(["w"], [[len(c) for c in cut.channels]], [1])
  exact = orders.exact_scores(space, errors)
  closed = orders.range_scores(space, {"w": cut})
  assert scipy.stats.spearmanr(exact, closed).statistic > 0.85
  assert 0.2 < closed.sum() / exact.sum() < 5
