"""The trained rule: the mixed rule's value to the bit, and derivatives that are worked out here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph
from flexiq_jax.quant import calibration, grouping, lowering, rules, straight
from flexiq_jax.quant.grouping import LowSettings
from tests.layers_for_test import KINDS, conv, einsum

LAYERS = {**KINDS, "convolution": conv((2, 8, 8, 5), (3, 3, 5, 4), padding=((1, 1), (1, 1)))}
SETTINGS = {
  "plain": LowSettings(group_size=2),
  "per output, uncorrected": LowSettings(
    group_size=3, weight_shift_per="output", bias_correction=False
  ),
}


@dataclasses.dataclass(frozen=True)
class Made:
  """A quantized layer with its groups, and inputs that fit it."""

  layer: graph.Layer
  w: np.ndarray
  x: np.ndarray
  q: rules.QLayer
  cut: grouping.Groups
  settings: LowSettings

  @property
  def kept(self):
    low = grouping.lower(self.layer, self.q, self.cut, self.settings)
    return straight.kept(self.layer, low, self.cut, self.settings)

  @property
  def scales(self):
    return straight.Scales(self.q.x_scale, self.q.w_scale)


@functools.cache
def made(name, how="plain", signed=True):
  """Channels of very different ranges, some beyond the clipping range."""
  case, rng = LAYERS[name], np.random.default_rng(5)
  layer = case.layer
  loud = 2.0 ** rng.integers(-4, 1, layer.in_channels)
  x = rng.standard_t(4, case.x) * np.asarray(layer.x_vector(loud, case.x))
  x = (x if signed else np.abs(x)).astype(np.float32)
  w = rng.standard_t(3, case.w).astype(np.float32)
  q = straight.quantize_layer(layer, w, scales_for(layer, x, w, signed), signed)
  codes = np.clip(np.rint(x / np.float32(q.x_scale)), *((-127, 127) if signed else (0, 255)))
  codes = np.asarray(layer.channels_last(codes)).reshape(-1, layer.in_channels).astype(int)
  counts = np.stack([np.bincount(c + (128 if signed else 0), minlength=256) for c in codes.T])
  cut = grouping.group_channels(layer, q, counts, SETTINGS[how])
  return Made(layer, w, x, q, cut, SETTINGS[how])


def scales_for(layer, x, w, signed):
  top = np.abs(layer.canonical(w)).max(axis=(1, 2)).reshape(-1)
  span = np.float32(0.8 * np.abs(x).max() / (127 if signed else 255))
  return straight.Scales(jnp.asarray(span), jnp.asarray(0.7 * top / 127, jnp.float32))


def mask_of(m, ratio=0.5):
  return np.arange(len(m.cut.channels)) < ratio * len(m.cut.channels)


def run(m, name, rule, w):
  return graph.with_rule(LAYERS[name].apply, rule)({"w": jnp.asarray(w)}, jnp.asarray(m.x))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_value_is_the_mixed_rules_bit_for_bit(name, how, signed):
  m = made(name, how, signed)
  key, mask = m.layer.name, mask_of(m)
  low = grouping.lower(m.layer, m.q, m.cut, m.settings)
  rule = straight.finetune_rule({key: m.kept}, {key: m.scales}, {key: mask})
  got = jax.jit(lambda w: run(m, name, rule, w))(m.w)
  want = jax.jit(lambda w: run(m, name, rules.mixed_rule({key: low}, {key: mask}), w))(m.w)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 30))
def test_traced_lowering_is_the_offline_one(name, how, seed, size):
  """On any weights and means, those at which sums of means round to even, too."""
  m = made(name, how)
  rng = np.random.default_rng(seed)
  w = (size * rng.standard_t(3, m.w.shape) * np.asarray(m.q.w_scale).mean()).astype(np.float32)
  means = rng.integers(-127 * 200, 127 * 200, (2, m.layer.in_channels)) / 200
  q = straight.quantize_layer(m.layer, w, m.scales, True)
  cut = dataclasses.replace(m.cut, x_mean=means[0], low_mean=means[1])
  want = grouping.lower(m.layer, q, cut, m.settings)
  kept = straight.kept(m.layer, want, cut, m.settings)
  got = straight._requantize(m.layer, w, m.scales, kept)
  for part in ("w", "shift", "group", "bias"):
    np.testing.assert_array_equal(getattr(got.low, part), getattr(want.low, part), part)
  np.testing.assert_array_equal(got.w, want.w)


def test_corrections_are_exact_integers():
  """Against Python's own integers, with the largest means and many channels."""
  rng = np.random.default_rng(0)
  case = einsum("bc,cn->bn", (4, 600), (600, 2))
  layer, w = case.layer, rng.choice([-1.0, 1.0], (600, 2)).astype(np.float32)
  q = straight.quantize_layer(
    layer, w, straight.Scales(jnp.float32(1), jnp.full(2, 1 / 127, jnp.float32)), False
  )
  cut = grouping.Cut(
    channels=(np.arange(500), np.arange(500, 600)),
    block=np.arange(2),
    x_shift=np.array([4, 0]),
    x_mean=rng.uniform(200, 255, 600).round(4),
    low_mean=rng.uniform(0, 255, 600).round(4),
  )
  low = grouping.lower(layer, q, cut, LowSettings())
  assert low.low is not None
  for j, channels in enumerate(cut.channels):
    for n in range(2):
      total = sum(
        round(cut.x_mean[c] * 10**4) * int(q.w[c, n])
        - round(cut.low_mean[c] * 10**4) * int(low.low.w[c, n])
        for c in channels
      )
      want = total // 10**4 + (
        (2 * (total % 10**4), (total // 10**4) % 2) > (10**4, 0)  # half goes to even
      )
      assert int(low.low.bias[j, n]) == want
  traced = straight._requantize(
    layer, w, straight.Scales(q.x_scale, q.w_scale), straight.kept(layer, low, cut, LowSettings())
  )
  np.testing.assert_array_equal(traced.low.bias, low.low.bias)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_derivatives_pass_roundings_and_stop_at_saturation(masked, signed):
  """Of a dense layer, by input, weights and both scales, from the formulas in NumPy."""
  m = made("dense", "plain", signed)
  mask = mask_of(m, 0.6) if masked else np.zeros(len(m.cut.channels), bool)
  low = grouping.lower(m.layer, m.q, m.cut, m.settings)
  assert low.low is not None
  key, u = m.layer.name, np.random.default_rng(7).normal(size=(40, 4)).astype(np.float32)
  masks = {key: mask} if masked else {}

  def value(x, w, scales):
    rule = straight.finetune_rule({key: m.kept}, {key: scales}, masks)
    return (graph.with_rule(LAYERS["dense"].apply, rule)({"w": w}, x) * u).sum()

  got = jax.grad(value, argnums=(0, 1, 2))(jnp.asarray(m.x), jnp.asarray(m.w), m.scales)

  x, w = m.x.astype(np.float64), m.w.astype(np.float64)
  sx, sw = float(m.q.x_scale), np.asarray(m.q.w_scale, np.float64)
  channels = mask[np.asarray(low.low.group)]
  lo, hi = (-127, 127) if signed else (0, 255)
  x8, w8 = np.clip(np.rint(m.x / np.float32(sx)), lo, hi), np.asarray(m.q.w, np.float64)
  e = np.asarray(low.low.shift)
  lowered = lowering.lower_activations(x8, np.broadcast_to(e, x8.shape), signed)
  x4 = np.asarray(lowered, np.float64) * 2.0**e
  w4 = np.asarray(low.low.w, np.float64)
  ew = grouping.weight_shifts(m.layer, low, m.cut, m.settings)
  x_in = (x / sx > lo - 0.5) & (x / sx < hi + 0.5)
  w_in = np.abs(w / sw) < 127.5
  x_in &= ~channels | (2 * np.abs(x4 - x8) <= 2.0**e)
  w_in8 = w_in.copy()
  w_in &= ~channels[:, None] | (2 * np.abs(w4 - w8) <= 2.0**ew)
  xq, wq = np.where(channels, x4, x8), np.where(channels[:, None], w4, w8)
  dx = (u * sw) @ wq.T  # by the input's codes, over s_x
  dw = sx * xq.T @ u * sw  # by the weights' codes
  # Each output of a channel in 4 bits gets x_mean w8 - low_mean w4 at every position.
  mean8, mean4 = (np.where(channels, v, 0)[:, None] for v in (m.cut.x_mean, m.cut.low_mean))
  pull = sx * sw * u.sum(axis=0)
  np.testing.assert_allclose(got[0], np.where(x_in, dx, 0), rtol=1e-4, atol=1e-4)
  dw8, dw4 = mean8 * pull, -mean4 * pull
  want = (np.where(w_in, dw, 0) + np.where(w_in8, dw8, 0) + np.where(w_in, dw4, 0)) / sw
  np.testing.assert_allclose(got[1], want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
  bias = (mean8 * w8 - mean4 * w4).sum(axis=0)
  want = (dx * (xq - np.where(x_in, x / sx, 0))).sum() + (u * sw * bias).sum()
  np.testing.assert_allclose(got[2].x, want, rtol=1e-3)
  slope8, slope4 = (w8 - np.where(w_in8, w / sw, 0)), (w4 - np.where(w_in, w / sw, 0))
  slope = wq - np.where(w_in, w / sw, 0)
  want = (dw / sw * slope).sum(axis=0) + (mean8 * slope8 - mean4 * slope4).sum(axis=0) * pull / sw
  np.testing.assert_allclose(got[2].w, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_layers_of_other_widths_are_trained_too():
  m = made("dense")
  q = straight.quantize_layer(
    m.layer, m.w, straight.Scales(m.q.x_scale * 16, m.q.w_scale * 16), True, 4
  )
  key = m.layer.name
  kept = straight.kept(m.layer, q, None, m.settings)
  rule = straight.finetune_rule({key: kept}, {key: straight.Scales(q.x_scale, q.w_scale)}, {})
  got = jax.jit(lambda w: run(m, "dense", rule, w))(m.w)
  want = jax.jit(lambda w: run(m, "dense", rules.uniform_rule({key: q}), w))(m.w)
  np.testing.assert_array_equal(got, want)
  assert np.abs(np.asarray(q.w)).max() == 8


def test_groups_too_large_to_count_are_refused():
  case = einsum("bc,cn->bn", (2, 4000), (4000, 1))
  q = straight.quantize_layer(
    case.layer,
    np.ones((4000, 1), np.float32),
    straight.Scales(jnp.float32(1), jnp.ones(1, jnp.float32)),
    True,
  )
  cut = grouping.Cut(
    (np.arange(4000),), np.zeros(1, int), np.zeros(1, int), np.zeros(4000), np.zeros(4000)
  )
  low = grouping.lower(case.layer, q, cut, LowSettings())
  with pytest.raises(ValueError, match=r"group_size: layer \w+ has groups of 4000 weights"):
    straight.kept(case.layer, low, cut, LowSettings())


def test_scales_that_calibration_found_give_its_codes():
  """Layers that nobody trained are the same, whichever way they are quantized."""
  m = made("convolution")
  q = calibration.quantize_layer(m.layer, m.w, 0.1, True, calibration.RangeSettings())
  again = straight.quantize_layer(m.layer, m.w, straight.Scales(q.x_scale, q.w_scale), True)
  np.testing.assert_array_equal(q.w, again.w)
  assert q.parts == again.parts
