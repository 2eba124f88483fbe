"""Searching for the order in which channel groups go to 4 bits, against the model's own output."""

from flexiq_jax.search.fitness import Fitness
from flexiq_jax.search.gram.influence import Influence
from flexiq_jax.search.log import SearchLog
from flexiq_jax.search.record import Found, Track
from flexiq_jax.search.run import population_mesh, search
from flexiq_jax.search.settings import SearchSettings

__all__ = [
  "Fitness",
  "Found",
  "Influence",
  "SearchLog",
  "SearchSettings",
  "Track",
  "population_mesh",
  "search",
]
