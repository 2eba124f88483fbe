"""Searching for the order in which channel groups go to 4 bits, against the model's own output."""

from flexiq_jax.search.fitness import DISTANCES, Distance, Fitness, population_mesh
from flexiq_jax.search.log import steps
from flexiq_jax.search.memory import memory_of
from flexiq_jax.search.record import Found
from flexiq_jax.search.run import search
from flexiq_jax.search.settings import METHODS, EvolutionSettings, SearchSettings

__all__ = [
  "DISTANCES",
  "METHODS",
  "Distance",
  "EvolutionSettings",
  "Fitness",
  "Found",
  "SearchSettings",
  "memory_of",
  "population_mesh",
  "search",
  "steps",
]
