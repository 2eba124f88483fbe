"""The pictures of a report: accuracy, what goes 4-bit when, bits of layers, unused bits, searches,
serving.

Every function draws arrays into a PNG file, with a PDF file beside it, and returns the path of the
former. Figures are made without pyplot, so nothing is left in a global registry and no display is
needed. A method has one name, colour and marker in all pictures (`looks`), so they can be read in
grey, too; shares are drawn in matplotlib's cividis and viridis. All are colour-blind safe.
"""

from flexiq_jax.runs.plots.accuracy import accuracy_against_ratio, spread
from flexiq_jax.runs.plots.compare import (
  accuracy_against_budget,
  bits_over_budgets,
  cross_layer_matrix,
)
from flexiq_jax.runs.plots.layers import layer_map, unused_bits
from flexiq_jax.runs.plots.looks import Look, looks
from flexiq_jax.runs.plots.search import search_result
from flexiq_jax.runs.plots.serving import (
  gain_against_ratio,
  latency_against_rate,
  load_over_time,
)

__all__ = [
  "Look",
  "accuracy_against_budget",
  "accuracy_against_ratio",
  "bits_over_budgets",
  "cross_layer_matrix",
  "gain_against_ratio",
  "latency_against_rate",
  "layer_map",
  "load_over_time",
  "looks",
  "search_result",
  "spread",
  "unused_bits",
]
