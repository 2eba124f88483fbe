"""From the bytes of a JPEG or PNG to one example, with every size looked at before memory is taken.

A file's header says how many pixels it has; Pillow reads it without decoding. Resizing the shorter
side makes a long thin image longer still, so that size is looked at, too. Nothing but the two
formats is tried: the decoders of others are never reached.
"""

import io

import numpy as np
from PIL import ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin

from flexiq_jax.serving.server.limits import Limits
from flexiq_jax.serving.server.model import Model, finite
from flexiq_jax.serving.server.refusals import Refused

_FORMATS = {
  b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
  b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
}


def example(content: bytes, model: Model, limits: Limits) -> np.ndarray:
  """Decodes an image, turns it as its EXIF tag says, and prepares it as in evaluation.

  Args:
    content: the file.
    model: with preprocessing.
    limits: of the server.

  Returns:
    float32 [1, *model.shape].

  Raises:
    Refused: no such image, a damaged one, or one with too many pixels.
  """
  assert model.preprocess is not None
  image = opened(content)
  width, height = image.size
  require_size(width, height, model, limits)
  try:
    image.load()
    upright = ImageOps.exif_transpose(image)
  except (OSError, SyntaxError, ValueError, EOFError, MemoryError, KeyError) as error:
    raise Refused(400, f"image: it does not decode: {error}; is the file complete?") from None
  try:
    x = model.preprocess(upright)[None]
  except ValueError as error:  # more than 8 bits a channel
    raise Refused(400, f"image: {error}") from None
  if x.shape[1:] != model.shape:
    side = f"{model.shape[1]} x {model.shape[0]}"
    raise Refused(400, f"image: {width} x {height} pixels; {side} are accepted")
  return finite(x, "image")


def opened(content: bytes) -> ImageFile.ImageFile:
  """Reads an image's header.

  Raises:
    Refused: it is neither a JPEG nor a PNG, or its header is damaged.
  """
  for start, plugin in _FORMATS.items():
    if content.startswith(start):
      try:
        # The plugin itself: `Image.open` tries other formats, and warns of many pixels globally.
        return plugin(io.BytesIO(content))
      except (OSError, SyntaxError, ValueError, EOFError, KeyError) as error:
        raise Refused(400, f"image: its header is damaged: {error}") from None
  raise Refused(415, f"image: {len(content)} bytes that are neither a JPEG nor a PNG")


def require_size(width: int, height: int, model: Model, limits: Limits) -> None:
  """Refuses images with more pixels than allowed, as they are or once they are resized.

  Raises:
    Refused: 413, with both numbers.
  """
  if width * height > limits.pixels:
    raise Refused(
      413, f"image: {width} x {height} pixels; up to {limits.pixels} pixels are accepted"
    )
  resize = model.geometry[0]
  if resize is not None and resize * resize * max(width, height) > limits.pixels * min(
    width, height
  ):
    raise Refused(
      413,
      f"image: {width} x {height} pixels; with its shorter side resized to {resize} it would have "
      f"more than the {limits.pixels} pixels that are accepted",
    )
