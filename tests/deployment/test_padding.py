"""What padding costs, against the rows counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from flexiq_jax import deployment
from flexiq_jax.graph import tracing

SPEC = jax.ShapeDtypeStruct
CONV = ("NHWC", "HWIO", "NHWC")


def traced_model():
  """A 3x3 convolution of 16 channels on 8 x 8 pixels, and a dense layer of 96."""

  def apply(p, x):
    x = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=CONV)
    return jnp.maximum(x, 0).mean(axis=(1, 2)) @ p["dense"]

  params = {"conv": SPEC((3, 3, 16, 96), jnp.float32), "dense": SPEC((96, 10), jnp.float32)}
  return tracing.trace(apply, params, SPEC((1, 8, 8, 16), jnp.float32))


@pytest.mark.parametrize(
  ("names", "size", "rows"),
  [
    (["dense"], 8, 12 * 128 / 96),
    (["dense"], 64, 2 * 128 / 96),
    (["dense"], 96, 128 / 96),
    # 16 copies of four channels are 64 places, and one block of 128 rows has all nine positions;
    # 8 copies of 16 channels fill 128 places, and nine positions take two of those.
    (["conv"], 4, 4 * 128 / (16 * 9)),
    (["conv"], 16, 2 * 128 / (16 * 9)),
  ],
)
def test_rows_and_bytes_of_one_layer(names, size, rows):
  found = deployment.padded(traced_model(), names, group_size=size)
  assert found.rows == pytest.approx(rows) and found.bytes == pytest.approx(1.5 * rows)


def test_a_shift_block_holds_small_groups():
  model = traced_model()
  whole = deployment.padded(model, ["dense"], group_size=96)
  assert deployment.padded(model, ["dense"], group_size=8, shift_block=96) == whole


def test_layers_count_by_their_products_and_their_weights():
  model = traced_model()
  both = deployment.padded(model, ["conv", "dense"], group_size=8)
  alone = [deployment.padded(model, [name], group_size=8) for name in ("conv", "dense")]
  macs, weights = (64 * 9 * 16 * 96, 960), (9 * 16 * 96, 960)
  mean = lambda values, by: sum(v * b for v, b in zip(values, by, strict=True)) / sum(by)
  assert both.rows == pytest.approx(mean([one.rows for one in alone], macs))
  assert both.bytes == pytest.approx(mean([one.bytes for one in alone], weights))


def test_no_layer_is_refused():
  with pytest.raises(ValueError, match="names: none of no layer has a kernel"):
    deployment.padded(traced_model(), [], group_size=8)
