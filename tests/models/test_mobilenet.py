"""MobileNetV2 and EfficientNet-Lite0: paddings, folded norms, widths, refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax import models
from flexiq_jax.models import layers
from flexiq_jax.models.mobilenet import EfficientNetLite, MobileNetV2, scale_channels


@pytest.mark.parametrize(("kernel", "size"), [(3, 8), (3, 7), (5, 8)])
def test_paddings_follow_torch_and_tensorflow(kernel, size):
  """Both paddings against an explicitly padded convolution at stride 2."""
  x = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
  for padding in layers.PADDINGS:
    module = layers.conv(
      2, 3, kernel, stride=2, padding=padding, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    if padding == "torch":
      before = after = (kernel - 1) // 2
    else:  # TensorFlow: ceil(size / 2) outputs, the odd row or column of zeros at the end.
      total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
      before, after = total // 2, total - total // 2
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    expected = jax.lax.conv_general_dilated(
      padded, module.kernel[...], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-5)


def test_paddings_differ_in_the_whole_model():
  tiny = models.MODELS["mobilenet_v2"].tiny
  apply, params = models.functional(models.create("mobilenet_v2", **tiny))
  shapes = nnx.eval_shape(lambda: models.create("mobilenet_v2", padding="tf_same", **tiny))
  apply_tf, _ = models.functional(shapes)
  x = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
  assert np.abs(apply(params, x) - apply_tf(params, x)).max() > 1e-3


def test_folded_variant_equals_the_norms_folded_by_hand():
  tiny = models.MODELS["mobilenet_v2"].tiny
  apply, params = models.functional(models.create("mobilenet_v2", **tiny))
  folded_apply, template = models.functional(
    nnx.eval_shape(lambda: models.create("mobilenet_v2", norm=False, **tiny))
  )
  rng = np.random.default_rng(0)
  flat = {
    path: np.asarray(leaf) + 0.3 * rng.random(leaf.shape, np.float32)
    for path, leaf in models.flatten(params).items()
  }
  folded = {}
  for path in models.flatten(template):
    stem, _, leaf = path.rpartition("/")
    if stem == "classifier":
      folded[path] = flat[path]
      continue
    # The norm is the next entry of the list that holds the convolution.
    parent, _, index = stem.rpartition("/")
    norm = f"{parent}/{int(index) + 1}"
    factor = flat[f"{norm}/scale"] / np.sqrt(flat[f"{norm}/var"] + 1e-5)
    shift = flat[f"{norm}/bias"] - flat[f"{norm}/mean"] * factor
    folded[path] = shift if leaf == "bias" else flat[path] * factor
  x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
  expected = np.asarray(apply(models.unflatten(flat), x))
  actual = np.asarray(folded_apply(models.unflatten(folded), x))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@given(st.integers(8, 2000), st.floats(0.1, 2.0))
def test_scaled_channels_are_multiples_and_lose_at_most_a_tenth(channels, factor):
  scaled = scale_channels(channels, factor)
  assert scaled % 8 == 0
  assert scaled >= 0.9 * channels * factor
  assert scaled <= max(8, channels * factor + 8)


def test_scaled_channels_known_values():
  # MobileNetV2 1.4 and 0.35, as published.
  assert [scale_channels(c, 1.4) for c in (32, 16, 24, 320, 1280)] == [48, 24, 32, 448, 1792]
  assert [scale_channels(c, 0.35) for c in (32, 16, 24, 96)] == [16, 8, 8, 32]


@pytest.mark.parametrize("network", [MobileNetV2, EfficientNetLite])
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"padding": "same"}, r"padding='same' is unknown; accepted: 'torch', 'tf_same'"),
    ({"width_mult": 0}, r"width_mult=0 is refused"),
    ({"width_mult": "wide"}, r"width_mult='wide' is refused"),
    ({"stages": ()}, r"stages is empty"),
    ({"stages": ((1, 8),)}, r"stages\[0\]=\(1, 8\) has 2 numbers; accepted: [45]"),
    ({"stages": ((1, 8, 0, 1, 3), (1, 8, 0, 1))}, r"stages\[.\]"),
    ({"last_channels": 0}, r"last_channels=0 is refused"),
    ({"num_classes": None}, r"num_classes=None is refused"),
  ],
)
def test_refused_arguments(network, arguments, message):
  with pytest.raises(ValueError, match=message):
    network(rngs=nnx.Rngs(0), **arguments)
