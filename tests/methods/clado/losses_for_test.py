"""Losses of batches, joined."""

from collections.abc import Sequence

import numpy as np

from flexiq_jax.methods.clado.matrix import Losses


def average(batches: Sequence[Losses], counts: Sequence[int]) -> Losses:
  """The mean over the examples of several batches; counts are their numbers of examples."""

  def mean(field):
    return np.average([getattr(batch, field) for batch in batches], axis=0, weights=counts)

  return Losses(float(mean("base")), mean("singles"), mean("pairs"))
