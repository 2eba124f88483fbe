"""Searching for the order in which channel groups go to 4 bits, against the model's own output."""

from flexiq_jax.search.fitness import Fitness
from flexiq_jax.search.influence import Influence
from flexiq_jax.search.log import SearchLog
from flexiq_jax.search.run import improve, population_mesh, search
from flexiq_jax.search.settings import SearchSettings
from flexiq_jax.search.track import Found, Track

__all__ = [
  "Fitness",
  "Found",
  "Influence",
  "SearchLog",
  "SearchSettings",
  "Track",
  "improve",
  "population_mesh",
  "search",
]
