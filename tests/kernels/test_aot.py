"""The TPU kernel compiles for every TPU with int8 products, at the layer shapes of real models."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from flexiq_jax.kernels import Activations, Epilogue, Requantize, Weights, tpu
from flexiq_jax.kernels.windows import Window
from tests import targets_for_test as targets

pytestmark = pytest.mark.aot

# (K, N, shift block): DeiT-S, ViT-B, and ResNet-50's products; of 3x3 ones those of stride 2, which
# take patches (K padded to 128).
SHAPES = {
  "deit_s qkv": (384, 1152, 384),
  "deit_s proj": (384, 384, 384),
  "deit_s fc1": (384, 1536, 384),
  "deit_s fc2": (1536, 384, 384),
  "vit_b qkv": (768, 2304, 256),
  "vit_b proj": (768, 768, 256),
  "vit_b fc1": (768, 3072, 256),
  "vit_b fc2": (3072, 768, 256),
  "resnet50 1x1 64 -> 256": (128, 256, 128),
  "resnet50 3x3 128": (1152, 128, 1152),
  "resnet50 3x3 512": (4608, 512, 256),
  "resnet50 1x1 2048 -> 512": (2048, 512, 256),
}
# ResNet-50's 3x3 convolutions of stride 1: (images, pixels a side, columns of x, N, columns of a
# block, copies of a channel).
WINDOWS = {
  "56 x 56": (2, 56, 128, 128, 128, 2),
  "28 x 28": (128, 28, 128, 128, 128, 1),
  "14 x 14": (128, 14, 256, 256, 256, 1),
  "14 x 14, batch 8": (8, 14, 256, 256, 256, 1),
  "7 x 7": (128, 7, 512, 512, 256, 1),
  "112 x 112, in parts": (1, 112, 128, 128, 128, 8),
}
# The same with all images of a batch innermost: the first is small, so that it compiles soon.
INNERMOST = {
  "3 x 2": (64, (3, 2), 128, 128, 128, 1),
  "56 x 56": (128, (56, 56), 128, 128, 128, 2),
  "28 x 28": (128, (28, 28), 128, 128, 128, 1),
  "14 x 14": (128, (14, 14), 256, 256, 256, 1),
  "7 x 7": (128, (7, 7), 512, 512, 256, 1),
}
CHIPS = ("v5e", "v5p", "v6e", "v7x")
CASES = [("v5e", name) for name in SHAPES]
CASES += [(chip, "vit_b fc1") for chip in CHIPS if chip != "v5e"]
CASES += [(chip, "deit_s fc2") for chip in CHIPS if chip != "v5e"]


@pytest.fixture(scope="module")
def device():
  return lambda chip: targets.get(chip).devices[0]


def compiled(
  device,
  k,
  n,
  block,
  *,
  out="bfloat16",
  requantize=False,
  dynamic=False,
  m=256,
  window=None,
  copies=1,
):
  sharding = SingleDeviceSharding(device)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  j, taps = k // block, 1 if window is None else len(window.offsets)
  columns = k // -(-taps // copies)
  x = Activations(
    x8=array(jnp.int8, m, columns),
    x4=array(jnp.int4, m, columns),
    boundary=array(jnp.int32),
    row_shift=array(jnp.int32, m, j) if dynamic else None,
  )
  w = Weights(
    w8=array(jnp.int8, k, n),
    w4=array(jnp.int8, k // 2, n),
    x_shift=array(jnp.int32, j),
    w_shift=array(jnp.int32, j, n),
    block=block,
    offset=8 if dynamic or window else 0,
    taps=taps,
    copies=copies,
  )
  epilogue = Epilogue(
    scale=array(jnp.float32, n),
    correction=array(jnp.int32, n),
    bias=array(jnp.float32, n),
    requantize=Requantize(
      scale=array(jnp.float32), boundary=array(jnp.int32), shift=array(jnp.int32, n), granule=128
    )
    if requantize
    else None,
    activation="gelu" if requantize else "none",
    out=out,
  )
  run = lambda *args: tpu.mixed_matmul(*args, window, kind=device.device_kind)
  return jax.jit(run).lower(x, w, epilogue).compile()


@pytest.mark.parametrize(("chip", "name"), CASES)
def test_layers_of_real_models_compile(device, chip, name):
  assert compiled(device(chip), *SHAPES[name]).as_text().count("tpu_custom_call") >= 1


@pytest.mark.parametrize(
  ("chip", "name"),
  [("v5e", name) for name in WINDOWS] + [(c, "14 x 14") for c in CHIPS if c != "v5e"],
)
def test_windows_of_real_models_compile(device, chip, name):
  images, side, *sizes = WINDOWS[name]
  convolution(device(chip), images, (side, side), *sizes)


@pytest.mark.parametrize(
  ("chip", "name"),
  [("v5e", "3 x 2")]
  + [pytest.param("v5e", name, marks=pytest.mark.slow) for name in list(INNERMOST)[1:]]
  + [pytest.param(chip, "28 x 28", marks=pytest.mark.slow) for chip in CHIPS if chip != "v5e"],
)
def test_windows_with_images_innermost_compile(device, chip, name):
  images, size, *sizes = INNERMOST[name]
  convolution(device(chip), images, size, *sizes, innermost=True)


def convolution(device, images, size, columns, n, own, copies, innermost=False):
  offsets = tuple((dh, dw) for dh in (-1, 0, 1) for dw in (-1, 0, 1))
  side_by_side = images if innermost else 1
  window = Window(height=size[0], width=size[1], offsets=offsets, images=side_by_side)
  rows = images * window.pixels
  shape = {"m": rows, "window": window, "copies": copies, "requantize": True}
  steps = -(-9 // copies)
  text = compiled(device, steps * columns, n, steps * own, **shape).as_text()
  assert text.count("tpu_custom_call") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e", "v7x"])
def test_long_tiles_compile(device, chip):
  """As many rows as a large batch has: they have to fit into the chip's memory."""
  for shape, requantize in (("vit_b fc1", True), ("vit_b fc2", False)):
    text = compiled(device(chip), *SHAPES[shape], requantize=requantize, m=4096).as_text()
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("chip", [*CHIPS])
def test_requantizing_compiles(device, chip):
  assert "tpu_custom_call" in compiled(device(chip), 256, 256, 128, requantize=True).as_text()


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_shifts_chosen_at_run_time_compile(device, chip):
  assert "tpu_custom_call" in compiled(device(chip), 256, 128, 128, dynamic=True).as_text()


@pytest.mark.parametrize("chip", [*CHIPS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_preparing_operands_compiles(device, chip, dtype):
  preparing(device(chip), dtype)


def preparing(device, dtype):
  sharding = SingleDeviceSharding(device)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def run(x, scale, shift, boundary, order):
    return tpu.quantize_lower(
      x, scale, shift, boundary, signed=False, order=order, granule=128, rows=128
    )

  arguments = (array(dtype, 200, 384), array("float32"), array("int32", 384), array("int32"))
  compiled = jax.jit(run).lower(*arguments, array("int32", 384)).compile()
  assert "tpu_custom_call" in compiled.as_text()


def test_kernels_compile_where_a_run_asks_for_float32(device):
  """Which is for products of floats (`process.full_precision`)."""
  with jax.default_matmul_precision("highest"):
    assert "tpu_custom_call" in compiled(device("v5e"), 256, 128, 128, m=320).as_text()
    preparing(device("v5e"), "float32")


def test_rows_that_are_no_whole_tile_compile(device):
  assert "tpu_custom_call" in compiled(device("v5e"), 256, 128, 128, m=1576).as_text()
