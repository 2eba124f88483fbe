"""A model as a graph of layers: find them, run them by a rule, cut at them, fold batch norm in.

Beside these names the modules `reorder`, `trace` and `unfold` are for use from outside.
"""

from flexiq_jax.graph.cut import Live, Segments, balanced, cut
from flexiq_jax.graph.describe import Contract
from flexiq_jax.graph.fold import batch_normed, fold_batch_norm
from flexiq_jax.graph.layer import Layer
from flexiq_jax.graph.origins import aval, needed
from flexiq_jax.graph.reorder import run_lengths
from flexiq_jax.graph.tracing import (
  Apply,
  Rule,
  Skipped,
  Traced,
  closest,
  layers,
  shared,
  skipped,
  weights,
  with_rule,
)

__all__ = [
  "Apply",
  "Contract",
  "Layer",
  "Live",
  "Rule",
  "Segments",
  "Skipped",
  "Traced",
  "aval",
  "balanced",
  "batch_normed",
  "closest",
  "cut",
  "fold_batch_norm",
  "layers",
  "needed",
  "run_lengths",
  "shared",
  "skipped",
  "weights",
  "with_rule",
]
