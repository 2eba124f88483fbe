"""Distorted digits: scikit-learn's turned, moved, stretched, covered, dimmed and noisy.

An embedded task that is not solved: a small network makes errors on it, so that losing bits costs
accuracy that can be measured. Every digit is drawn several times, always in its own split: none is
in both splits in whatever form.

| distortion | range, uniform |
|---|---|
| rotation | -20 to 20 degrees |
| size | 0.8 to 1.1 times, each side its own |
| shift | -1 to 1 pixel, each side its own |
| contrast | 0.7 to 1 |
| cover | a square of 2 x 2 pixels anywhere, of one grey level |
| noise | normal, standard deviation 12 of 255 |
"""

import functools

import numpy as np

from flexiq_jax.data.arrays import ArraySource, open_digits

COPIES = {"train": 4, "test": 10}
_SEEDS = {"train": 1, "test": 2}
_COVER = 2  # pixels along each side
_NOISE = 12.0


@functools.cache
def _drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 `[N, 8, 8, 1]` and labels int32 `[N]`; copy c of digit i is c * digits + i."""
  digits = open_digits(split)
  sources = np.stack([np.asarray(digits.image(i), np.float64) for i in range(len(digits))])
  count, side = COPIES[split] * len(digits), sources.shape[1]
  # Of NumPy's generators this one promises the same numbers for ever.
  random = np.random.RandomState(_SEEDS[split])
  angle = np.deg2rad(random.uniform(-20, 20, (count, 1, 1)))
  size = random.uniform(0.8, 1.1, (2, count, 1, 1))
  shift = random.uniform(-1, 1, (2, count, 1, 1))
  contrast = random.uniform(0.7, 1, (count, 1, 1))
  corner = random.randint(0, side - _COVER + 1, (2, count, 1, 1))
  grey = random.uniform(0, 255, (count, 1, 1))
  noise = random.normal(0, _NOISE, (count, side, side))

  places = np.mgrid[:side, :side][:, None]
  y, x = places - (side - 1) / 2 - shift
  y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
  images = np.tile(sources, (COPIES[split], 1, 1))
  images = contrast * _sampled(images, y / size[0], x / size[1])
  covered = ((corner <= places) & (places < corner + _COVER)).all(axis=0)
  pixels = np.clip(np.rint(np.where(covered, grey, images) + noise), 0, 255)
  return pixels.astype(np.uint8)[..., None], np.tile(digits.labels, COPIES[split])


def _sampled(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Bilinear values at places from the centre; black outside.

  Args:
    images: `[N, S, S]`.
    y: `[N, h, w]`, down from the centre.
    x: `[N, h, w]`, to the right of it.

  Returns:
    `[N, h, w]`.
  """
  side = images.shape[1]
  padded, which = np.pad(images, ((0, 0), (1, 1), (1, 1))), np.arange(len(images))[:, None, None]
  # A place outside of the padding takes its black.
  y, x = (np.clip(at + (side + 1) / 2, 0, side + 1) for at in (y, x))
  top, left = (np.minimum(at.astype(np.int64), side) for at in (y, x))
  down, right = y - top, x - left
  upper, lower = (
    (1 - right) * padded[which, row, left] + right * padded[which, row, left + 1]
    for row in (top, top + 1)
  )
  return (1 - down) * upper + down * lower


def open_distorted(split: str, *, num_classes: int | None = None) -> ArraySource:
  """The distorted digits: 5,408 train and 4,450 test images, 8x8, one channel, ten classes."""
  images, labels = _drawn(split)
  return ArraySource(
    images,
    labels,
    name="distorted_digits",
    split=split,
    num_classes=10 if num_classes is None else num_classes,
    identity=("distorted_digits", split),
  )
