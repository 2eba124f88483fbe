"""Quantization without state: 8-bit codes, the 4-bit codes inside them, layers computed on both.

Beside these names the modules are for use from outside; most of what they hold are functions.
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
