"""The pictures of a report: accuracy, what goes 4-bit when, bits of layers, unused bits, searches.

Every function draws arrays into a file and returns its path. Figures are made without pyplot, so
nothing is left in a global registry and no display is needed. Colours are the colour-blind safe
set of Okabe and Ito (https://jfly.uni-koeln.de/color/) and matplotlib's cividis and viridis;
methods also differ in their markers, so the pictures can be read in grey.
"""

from flexiq_jax.runs.plots.accuracy import accuracy_against_ratio, spread
from flexiq_jax.runs.plots.compare import (
  accuracy_against_budget,
  bits_over_budgets,
  cross_layer_matrix,
)
from flexiq_jax.runs.plots.drawing import COLOURS, GREY, MARKERS
from flexiq_jax.runs.plots.layers import layer_map, unused_bits
from flexiq_jax.runs.plots.search import search_progress

__all__ = [
  "COLOURS",
  "GREY",
  "MARKERS",
  "accuracy_against_budget",
  "accuracy_against_ratio",
  "bits_over_budgets",
  "cross_layer_matrix",
  "layer_map",
  "search_progress",
  "spread",
  "unused_bits",
]
