"""QuantuneV2's metrics of one output, by their definition."""

import math

import numpy as np


def nmse(a: np.ndarray, q: np.ndarray) -> float:
  """Mean (a - q)^2 over mean a^2."""
  a, q = np.asarray(a, np.float64), np.asarray(q, np.float64)
  return float(np.square(a - q).sum() / np.square(a).sum())


def sqnr(a: np.ndarray, q: np.ndarray) -> float:
  """Signal to quantization noise ratio in dB."""
  return -10 * math.log10(nmse(a, q))
