"""Preprocessing against arithmetic worked out by hand, and, where they are installed, against timm
and torchvision themselves (marker `parity`).
"""

import importlib
import math
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from flexiq_jax.data import Preprocess
from flexiq_jax.data.preprocess import crop_start, resized

_SIDES = st.integers(1, 600)
_PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
_GREY = {"mean": (0.0,), "std": (1.0,)}


def _image(width, height, mode="RGB", seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
  ("width", "height", "shorter", "want"),
  [
    (500, 375, 256, (341, 256)),  # 256 * 500 / 375 = 341.33, cut off
    (375, 500, 256, (256, 341)),
    (400, 299, 256, (342, 256)),  # 342.47
    (299, 400, 256, (256, 342)),
    (100, 100, 64, (64, 64)),
    (3, 1000, 6, (6, 2000)),
  ],
)
def test_resized_by_hand(width, height, shorter, want):
  assert resized(width, height, shorter) == want


@pytest.mark.parametrize(
  ("side", "crop", "want"),
  [
    (256, 224, 16),
    (257, 224, 16),  # 16.5, ties to even
    (259, 224, 18),  # 17.5, ties to even
    (341, 224, 58),  # 58.5, ties to even
    (224, 224, 0),
    (223, 224, 0),  # one black column, after the image
    (222, 224, -1),
    (219, 224, -2),  # five black columns: two before, three after
  ],
)
def test_crop_start_by_hand(side, crop, want):
  assert crop_start(side, crop) == want


@hypothesis.given(_SIDES, _SIDES)
def test_a_crop_is_centred_to_a_pixel(side, crop):
  start = crop_start(side, crop)
  before, after = start, side - crop - start
  assert abs(before - after) <= 1
  assert (before >= 0 and after >= 0) if crop <= side else (before <= 0 and after <= 0)


@hypothesis.given(_SIDES, _SIDES, st.integers(1, 300))
def test_resizing_keeps_the_aspect_ratio(width, height, shorter):
  got = resized(width, height, shorter)
  assert min(got) == shorter
  assert (got[0] - got[1]) * (width - height) >= 0  # the longer side stays the longer one
  exact = shorter * max(width, height) / min(width, height)
  assert exact - 1 < max(got) <= exact + 1e-9


def test_without_resize_the_crop_is_a_slice():
  image = _image(256, 256)
  got = Preprocess(crop=224, **_PLAIN).geometry(image)
  np.testing.assert_array_equal(got, np.asarray(image)[16:240, 16:240])


@pytest.mark.parametrize(("width", "height"), [(3, 9), (9, 3), (4, 4), (3, 3), (5, 2)])
def test_a_crop_larger_than_the_image_is_padded_with_black(width, height):
  image, crop = _image(width, height), 6
  want = np.zeros((crop, crop, 3), np.uint8)
  # Each side is either padded or cut, on its own.
  spans = []
  for side in (height, width):
    if side < crop:
      pad = (crop - side) // 2
      spans.append((slice(pad, pad + side), slice(None)))
    else:
      start = round((side - crop) / 2)
      spans.append((slice(None), slice(start, start + crop)))
  (to_y, from_y), (to_x, from_x) = spans
  want[to_y, to_x] = np.asarray(image)[from_y, from_x]
  np.testing.assert_array_equal(Preprocess(crop=crop, **_PLAIN).geometry(image), want)


def test_resize_is_pillows_antialiased_filter():
  image = _image(50, 40)
  for name, filter_ in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
    got = Preprocess(resize=20, interpolation=name, **_PLAIN).geometry(image)
    np.testing.assert_array_equal(got, np.asarray(image.resize((25, 20), filter_)))
  # Halving by the antialiased triangle filter weighs 1/8, 3/8, 3/8, 1/8 inside a row.
  row = np.tile(np.array([0, 0, 0, 80, 160, 0, 0, 0], np.uint8), (8, 1))
  got = Preprocess(resize=4, **_GREY).geometry(Image.fromarray(row))
  np.testing.assert_array_equal(got[0, :, 0], [0, 50, 70, 0])


def test_normalisation_by_hand():
  preprocess = Preprocess(mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 0.25))
  got = preprocess(Image.new("RGB", (2, 1), (255, 51, 0)))
  assert got.dtype == np.float32 and got.shape == (1, 2, 3)
  np.testing.assert_array_equal(got, np.broadcast_to(np.float32([1.0, 0.2, -4.0]), (1, 2, 3)))
  # (x - 127) / 128, as EfficientNet-Lite wants it.
  lite = Preprocess(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
  x = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, -1)
  np.testing.assert_allclose(lite.normalize(x), (x.astype(float) - 127) / 128, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "YCbCr"])
@pytest.mark.parametrize("model", [_GREY, _PLAIN])
def test_every_8_bit_mode_becomes_the_models_channels(mode, model):
  preprocess = Preprocess(crop=4, **model)
  got = preprocess.geometry(_image(6, 5, mode))
  assert got.shape == (4, 4, preprocess.channels) and got.dtype == np.uint8


def test_colours_survive_conversion():
  red = (200, 10, 10)
  for image in (
    Image.new("RGBA", (2, 2), (*red, 0)),  # alpha is dropped, not blended
    Image.new("RGB", (2, 2), red).quantize(4),
    Image.new("RGB", (2, 2), red).convert("CMYK"),
  ):
    got = Preprocess(**_PLAIN).geometry(image)
    np.testing.assert_allclose(got.astype(int), np.broadcast_to(red, (2, 2, 3)), atol=2)
  transparent = Image.new("RGB", (2, 2), red).quantize(4)
  transparent.info["transparency"] = b"\x00\xff"  # would warn if converted directly
  assert Preprocess(**_PLAIN).geometry(transparent).shape == (2, 2, 3)
  grey = Preprocess(**_PLAIN).geometry(Image.new("L", (1, 1), 7))
  np.testing.assert_array_equal(grey, np.full((1, 1, 3), 7))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused_instead_of_clipped(mode):
  with pytest.raises(ValueError, match=f"mode {mode} has more than 8 bits"):
    Preprocess(**_PLAIN).geometry(Image.new(mode, (4, 4)))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"resize": 0}, "resize is 0; a positive number of pixels or None"),
    ({"crop": -1}, "crop is -1"),
    ({"crop": 2.5}, "crop is 2.5"),
    ({"interpolation": "cubic"}, "interpolation 'cubic' is unknown; accepted: .*bicubic"),
    ({"mean": (0.5,)}, "mean has 1 and std 3 values"),
    ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean has 2 and std 2 values"),
    ({"mean": (123.7, 116.3, 103.5)}, "mean is .*values in 0..1 are accepted"),
    ({"std": (58.4, 57.1, 57.4)}, "std is .*values above 0 and up to 1"),
    ({"std": (0.0, 0.1, 0.1)}, "std is"),
  ],
)
def test_wrong_fields_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Preprocess(**options)


def test_lists_of_a_config_give_an_equal_hashable_preprocess():
  got = Preprocess(crop=4, mean=[0.5] * 3, std=[0.5] * 3)
  assert got == Preprocess(crop=4, mean=(0.5,) * 3, std=(0.5,) * 3) and hash(got) is not None


def _import(name):
  """Imports a module of timm or torchvision, also where torchvision's operators do not load.

  Transforms need none of them, but the import fails where two schemas are not defined.
  """
  torch = pytest.importorskip("torch")
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    pytest.skip(f"{error.name} is not installed")
  except RuntimeError as error:
    if "torchvision::nms" not in str(error):
      raise
  for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", "timm")]:
    del sys.modules[module]
  schemas = torch.library.Library("torchvision", "DEF")
  for operator in ("nms", "qnms"):
    schemas.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
  torch.flexiq_torchvision_schemas = schemas  # they vanish with the object that defined them
  return importlib.import_module(name)


_SIZES = [(500, 375), (333, 500), (256, 256), (64, 48), (20, 300), (223, 341), (9, 500)]


@pytest.mark.parity
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [None, 256, 235])
def test_equals_torchvision_bit_for_bit(interpolation, resize):
  transforms = _import("torchvision.transforms")
  ours = Preprocess(resize=resize, crop=224, interpolation=interpolation)
  steps = [transforms.CenterCrop(224), transforms.ToTensor()]
  steps += [transforms.Normalize(ours.mean, ours.std)]
  if resize is not None:
    mode = transforms.InterpolationMode(interpolation)
    steps.insert(0, transforms.Resize(resize, mode))
  theirs = transforms.Compose(steps)
  for seed, (width, height) in enumerate(_SIZES):
    image = _image(width, height, seed=seed)
    np.testing.assert_array_equal(ours(image), theirs(image).numpy().transpose(1, 2, 0))


@pytest.mark.parity
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_timm_bit_for_bit(crop_pct, interpolation):
  timm_data = _import("timm.data")
  resize = math.floor(224 / crop_pct)
  ours = Preprocess(resize=resize, crop=224, interpolation=interpolation)
  theirs = timm_data.create_transform(
    (3, 224, 224),
    is_training=False,
    interpolation=interpolation,
    mean=ours.mean,
    std=ours.std,
    crop_pct=crop_pct,
  )
  for seed, (width, height) in enumerate(_SIZES):
    image = _image(width, height, seed=seed)
    np.testing.assert_array_equal(ours(image), theirs(image).numpy().transpose(1, 2, 0))
