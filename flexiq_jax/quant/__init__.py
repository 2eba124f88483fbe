"""Quantization without state: 8-bit codes, the 4-bit codes inside them, layers computed on both.

Code elsewhere may use these names and the modules, most of which hold functions.
"""

from flexiq_jax.quant.calibration import BINS, PassListener, RangeSettings, Values
from flexiq_jax.quant.grouping import Cut, Groups, LowSettings
from flexiq_jax.quant.quantizer import check_one_of
from flexiq_jax.quant.rules import Low, QLayer, QModel
from flexiq_jax.quant.selectable import selectable

__all__ = [
  "BINS",
  "Cut",
  "Groups",
  "Low",
  "LowSettings",
  "PassListener",
  "QLayer",
  "QModel",
  "RangeSettings",
  "Values",
  "check_one_of",
  "selectable",
]
