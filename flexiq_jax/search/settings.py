"""Settings of a search."""

import dataclasses
import itertools
import math
from typing import Literal

from flexiq_jax.quant import check_one_of
from flexiq_jax.search.fitness import DISTANCES

METHODS = ("greedy", "gram", "evolution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
  """Settings of the evolutionary operators; of the paper's none is known.

  Attributes:
    population: individuals.
    elites: individuals that outlive a generation; offspring replaces the others.
    tournament: how many individuals compete to be a parent.
    layer_rate: probability that a layer is mutated.
    swap_share: share of a layer's groups that leave the prefix in one mutation at most, as many
      enter it; one group may always.
    noise: standard deviation of the logarithm of the factors on the scores in noisy greedy seeds.
  """

  population: int = 32
  elites: int = 4
  tournament: int = 3
  layer_rate: float = 0.1
  swap_share: float = 0.05
  noise: float = 0.5

  def __post_init__(self):
    def require(fine: bool, field: str, accepted: str) -> None:
      if not fine:
        raise ValueError(f"{field} is {getattr(self, field)!r}; {accepted} is accepted")

    def whole(field: str, least: int, most: int, accepted: str) -> None:
      value = getattr(self, field)
      require(type(value) is int and least <= value <= most, field, accepted)

    whole("population", 2, 2**20, "an integer from 2")
    below = f"an integer from 1 up to, but not, the population of {self.population}"
    whole("elites", 1, self.population - 1, below)
    whole("tournament", 1, self.population, f"an integer in 1..{self.population} (population)")
    for field in ("layer_rate", "swap_share", "noise"):
      value, rate = getattr(self, field), field != "noise"
      number = isinstance(value, (int, float)) and math.isfinite(value)
      fine = number and (0 < value <= 1 if rate else value >= 0)
      require(fine, field, "a number above 0 and up to 1" if rate else "a number from 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
  """How the order of the channel groups is found.

  Attributes:
    method: `greedy` (no search), `gram` (quadratic model of the output distance, annealed) or
      `evolution` (FlexiQ's Algorithm 1).
    levels: ratios whose masks are searched, ascending, between 0 and 1.
    distance: from the 8-bit model's logits: `l2` or `kl`.
    images: search examples, of the calibration examples; 0 takes all.
    memory: GiB that evaluating a population, or a backward pass, may take on each device.
    block: most examples in one forward pass.
    max_minutes: time after which a search takes what it has, shared evenly by the levels; 0 sets
      no limit. Where it strikes, results depend on the machine's speed.
    max_forwards: the same for evaluations, in forward passes over the search examples.
    probes: gram: k, random probes per example (see `influence`).
    effects: gram: how effects of groups are measured, by backward passes of random `probes` or by
      `flips` of every group.
    rounds: gram: most linearisations around a level's best mask, after the first around 8 bits.
    candidates: gram: masks of each round that are evaluated truly.
    max_groups: gram: above so many groups, neighbours of one layer are tied together.
    polish: gram: generations of evolution after it, at each level.
    mode: evolution: `progressive`, level by level with the lower ones frozen (Algorithm 1), or
      `joint`, all levels at once.
    generations: evolution: of each level.
    patience: evolution: a level ends after so many generations without a better best; 0: never.
    halving: evolution: evaluate on a quarter of the examples first, and only the better half on
      half of them, and half of those on all.
    population, elites, tournament, layer_rate, swap_share, noise: evolution; see
      `EvolutionSettings`.
    checkpoint_every: evolution: generations between checkpoints.
  """

  method: Literal["greedy", "gram", "evolution"] = "gram"
  levels: tuple[float, ...] = (0.25, 0.5, 0.75)
  distance: Literal["l2", "kl"] = "l2"
  images: int = 0
  memory: float = 4.0
  block: int = 64
  max_minutes: float = 0.0
  max_forwards: float = 0.0
  effects: Literal["probes", "flips"] = "probes"
  probes: int = 4
  rounds: int = 1
  candidates: int = 6
  max_groups: int = 4096
  polish: int = 0
  mode: Literal["progressive", "joint"] = "progressive"
  generations: int = 30
  patience: int = 0
  halving: bool = False
  population: int = EvolutionSettings.population
  elites: int = EvolutionSettings.elites
  tournament: int = EvolutionSettings.tournament
  layer_rate: float = EvolutionSettings.layer_rate
  swap_share: float = EvolutionSettings.swap_share
  noise: float = EvolutionSettings.noise
  checkpoint_every: int = 5

  def __post_init__(self):
    check_one_of("method", self.method, METHODS)
    check_one_of("distance", self.distance, tuple(DISTANCES))
    check_one_of("effects", self.effects, ("probes", "flips"))
    check_one_of("mode", self.mode, ("progressive", "joint"))
    levels = self.levels
    numbers = all(isinstance(level, int | float) for level in levels)
    rising = numbers and all(a < b for a, b in itertools.pairwise(levels))
    if not levels or not rising or not all(0 < level < 1 for level in levels):
      raise ValueError(f"levels: {tuple(levels)}; increasing numbers between 0 and 1 are accepted")
    for field in ("block", "probes", "candidates", "checkpoint_every", "generations"):
      _at_least(1, field, getattr(self, field))
    for field in ("images", "rounds", "polish", "patience", "max_minutes", "max_forwards"):
      _at_least(0, field, getattr(self, field))
    _at_least(2, "max_groups", self.max_groups)
    if self.halving and self.mode == "joint":
      raise ValueError(
        "halving: True; with mode joint, where levels would compete, False is accepted"
      )
    if not 0 < self.memory < math.inf:
      raise ValueError(f"memory: {self.memory} is not a positive number of GiB")
    _ = self.evolution

  @property
  def capacity(self) -> int:
    """How many masks are evaluated at once."""
    return self.population if self.method == "evolution" else self.candidates

  @property
  def evolution(self) -> EvolutionSettings:
    """The operators' settings."""
    names = [field.name for field in dataclasses.fields(EvolutionSettings)]
    return EvolutionSettings(**{name: getattr(self, name) for name in names})


def _at_least(least: int, field: str, value: float) -> None:
  if not value >= least:
    raise ValueError(f"{field}: {value}; at least {least} is accepted")
  if value >= 2**31:
    raise ValueError(f"{field}: {value}; at most {2**31 - 1} is accepted")
