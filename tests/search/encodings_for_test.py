"""Small search problems of one shape, so that a compiled function serves many tests."""

import jax
import numpy as np

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search.evolution.keys import Encoding, decode
from flexiq_jax.search.settings import EvolutionSettings

NAMES, SIZES, TOTAL = ("a", "b", "c"), (7, 4, 3), 14
OWN = np.repeat(np.eye(3, dtype=bool), SIZES, axis=1)  # [L, T], the groups of each layer
EVEN = Space.create(NAMES, [[1] * size for size in SIZES], [5, 5, 5])
UNEVEN = Space.create(NAMES, [[4] * 6 + [1], [4, 4, 4, 2], [4, 4, 3]], [10, 25, 60])
SCORES = np.random.default_rng(0).lognormal(size=TOTAL)
SETTINGS = EvolutionSettings(population=16, elites=3, tournament=3, layer_rate=0.4, swap_share=0.3)

decode_all = jax.jit(jax.vmap(decode, (None, 0)))


def encoding_of(space, ratios=(0.5,), order=None, scores=SCORES):
  return Encoding.create(space, scores, ratios, order)


def frozen_encoding(ratios=(0.5,)):
  """A prefix, a random order's at a quarter, and the encoding on the uneven space after it."""
  order = np.random.default_rng(1).permutation(TOTAL)
  frozen = order[: Schedule(UNEVEN, order).prefix(0.25)]
  assert len(frozen) > 1
  return frozen, encoding_of(UNEVEN, ratios, frozen)


def per_layer(flags):
  """Counts in each layer, bool `[..., T]` -> int `[..., L]`."""
  return np.stack([flags[..., own].sum(axis=-1) for own in OWN], axis=-1)
