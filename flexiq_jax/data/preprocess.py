"""From a decoded image to the model's input, as torchvision and timm do it for evaluation.

  resize      shorter side to `resize`, the longer to int(resize * long / short); antialiased
  crop        central `crop` x `crop`, offset round((side - crop) / 2) with ties to even;
              where the image is smaller, black padding, (crop - side) // 2 before it
  to [0, 1]   float32, x / 255
  normalise   (x - mean) / std, per channel

Sources: torchvision.transforms.functional (resize, center_crop, to_tensor, normalize) on Pillow
images; timm.data.transforms_factory.transforms_imagenet_eval. The results are equal bit for bit
(tests, marker `parity`).
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from flexiq_jax.data.source import is_integer

INTERPOLATIONS = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 3: "RGB"}
# Modes with more than 8 bits a channel: Pillow's convert would clip them to white, silently.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
  """Evaluation preprocessing of one model.

  Attributes:
    resize: pixels of the shorter side after resizing; None keeps the image as it is.
    crop: side of the central crop in pixels; None keeps the whole image.
    interpolation: key of `INTERPOLATIONS`, used by resize.
    mean: per channel, in 0..1. Its length, 1 or 3, is the model's number of channels: images are
      converted to grey or RGB (alpha is dropped).
    std: per channel, in 0..1, positive.
  """

  resize: int | None = None
  crop: int | None = None
  interpolation: str = "bilinear"
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)

  def __post_init__(self):
    # A config gives lists; tuples keep the object hashable.
    object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
    object.__setattr__(self, "std", tuple(float(s) for s in self.std))
    for field in ("resize", "crop"):
      value = getattr(self, field)
      if value is not None and (not is_integer(value) or value < 1):
        raise ValueError(f"{field} is {value}; a positive number of pixels or None is accepted")
    if self.interpolation not in INTERPOLATIONS:
      raise ValueError(
        f"interpolation '{self.interpolation}' is unknown; accepted: {', '.join(INTERPOLATIONS)}"
      )
    if len(self.mean) not in _MODES or len(self.std) != len(self.mean):
      raise ValueError(
        f"mean has {len(self.mean)} and std {len(self.std)} values; "
        "one each (grey) or three each (RGB) are accepted"
      )
    if not all(0 <= m <= 1 for m in self.mean):
      raise ValueError(f"mean is {self.mean}; values in 0..1 are accepted (divide by 255)")
    if not all(0 < s <= 1 for s in self.std):
      raise ValueError(f"std is {self.std}; values above 0 and up to 1 are accepted")

  @property
  def channels(self) -> int:
    """Channels of the model's input."""
    return len(self.mean)

  def geometry(self, image: Image.Image) -> np.ndarray:
    """Converts, resizes and crops.

    Args:
      image: a decoded image of any 8-bit Pillow mode.

    Returns:
      uint8 [H, W, C].

    Raises:
      ValueError: the image has more than 8 bits a channel.
    """
    image = _convert(image, self.channels)
    if self.resize is not None:
      size = resized(image.width, image.height, self.resize)
      if size != image.size:
        image = image.resize(size, INTERPOLATIONS[self.interpolation])
    if self.crop is not None:
      left, top = crop_start(image.width, self.crop), crop_start(image.height, self.crop)
      if image.size != (self.crop, self.crop):
        # Pillow fills what lies outside the image with black, which is the padding asked for.
        image = image.crop((left, top, left + self.crop, top + self.crop))
    return np.asarray(image, np.uint8).reshape(image.height, image.width, self.channels)

  def normalize(self, images: Any) -> Any:
    """Normalises; works on NumPy arrays and, inside jit, on JAX arrays.

    Args:
      images: uint8 or float array [..., C] in 0..255.

    Returns:
      float32, of the same shape.
    """
    shape = (1,) * (images.ndim - 1) + (self.channels,)
    mean = np.asarray(self.mean, np.float32).reshape(shape)
    std = np.asarray(self.std, np.float32).reshape(shape)
    return (images.astype(np.float32) / np.float32(255) - mean) / std

  def __call__(self, image: Image.Image) -> np.ndarray:
    """The model's input for one image, float32 [H, W, C]."""
    return self.normalize(self.geometry(image))


def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
  """Width and height after resizing the shorter side to `shorter` pixels, as torchvision rounds."""
  short, long = min(width, height), max(width, height)
  scaled = int(shorter * long / short)
  return (shorter, scaled) if width <= height else (scaled, shorter)


def crop_start(side: int, crop: int) -> int:
  """First pixel of a central crop along one side; negative where the crop needs padding."""
  if crop > side:
    return -((crop - side) // 2)
  return round((side - crop) / 2)


def _convert(image: Image.Image, channels: int) -> Image.Image:
  mode = _MODES[channels]
  if image.mode == mode:
    return image
  if image.mode in _DEEP_MODES:
    raise ValueError(
      f"image of mode {image.mode} has more than 8 bits a channel; convert it to 8 bits first"
    )
  if image.mode == "P":
    # A palette with transparency warns when it is converted to RGB directly.
    image = image.convert("RGBA")
  return image.convert(mode)
