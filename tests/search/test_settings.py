"""Settings of a search: what is refused, and what the operators get."""

import dataclasses

import pytest

from flexiq_jax.search.run import ALGORITHMS
from flexiq_jax.search.settings import METHODS, EvolutionSettings, SearchSettings


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"method": "random"}, "method: 'random' is not one of greedy, gram, evolution"),
    ({"distance": "l1"}, "distance: 'l1' is not one of l2, kl"),
    ({"mode": "both"}, "mode: 'both' is not one of progressive, joint"),
    ({"levels": ()}, r"levels: \(\); increasing numbers between 0 and 1 are accepted"),
    ({"levels": (0.5, 0.5)}, r"levels: \(0.5, 0.5\)"),
    ({"levels": (0.5, 0.25)}, "levels"),
    ({"levels": (0.0, 0.5)}, "levels"),
    ({"levels": (0.5, 1.0)}, "levels"),
    ({"levels": (float("nan"),)}, "levels"),
    ({"block": 0}, "block: 0; at least 1 is accepted"),
    ({"probes": 0}, "probes: 0"),
    ({"candidates": 0}, "candidates: 0"),
    ({"checkpoint_every": 0}, "checkpoint_every: 0"),
    ({"generations": 0}, "generations: 0"),
    ({"images": -1}, "images: -1; at least 0 is accepted"),
    ({"rounds": -1}, "rounds: -1"),
    ({"polish": -1}, "polish: -1"),
    ({"patience": -1}, "patience: -1"),
    ({"max_minutes": -0.5}, "max_minutes: -0.5"),
    ({"max_minutes": float("nan")}, "max_minutes: nan"),
    ({"max_forwards": -1}, "max_forwards: -1"),
    ({"max_groups": 1}, "max_groups: 1; at least 2 is accepted"),
    ({"memory": 0.0}, "memory: 0.0 is not a positive number of GiB"),
    ({"memory": float("nan")}, "memory: nan"),
    ({"memory": float("inf")}, "memory: inf is not a positive number of GiB"),
    ({"halving": True, "mode": "joint"}, "halving: True; with mode joint"),
    ({"population": 1}, "population is 1"),
    ({"elites": 32}, "elites is 32"),
    ({"noise": -1.0}, "noise is -1.0"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    SearchSettings(**change)


def test_operators_get_their_settings():
  values = {
    "population": 7,
    "elites": 2,
    "tournament": 4,
    "layer_rate": 0.3,
    "swap_share": 0.2,
    "noise": 0.9,
  }
  assert {field.name for field in dataclasses.fields(EvolutionSettings)} == values.keys()
  assert SearchSettings(**values).evolution == EvolutionSettings(**values)


def test_defaults_are_those_of_the_operators():
  assert SearchSettings().evolution == EvolutionSettings()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"population": 1}, "population is 1; an integer from 2 is accepted"),
    ({"population": 8.0}, "population is 8.0; an integer from 2"),
    ({"elites": 0}, "elites is 0; an integer from 1 up to, but not, the population of 32"),
    ({"elites": 32}, "elites is 32; an integer from 1 up to, but not, the population of 32"),
    ({"population": 4, "elites": 4}, "elites is 4; an integer from 1 up to, but not, .* of 4"),
    ({"elites": True}, "elites is True"),
    ({"tournament": 0}, r"tournament is 0; an integer in 1\.\.32 \(population\)"),
    ({"tournament": 33}, r"tournament is 33; an integer in 1\.\.32 \(population\)"),
    ({"layer_rate": 0.0}, "layer_rate is 0.0; a number above 0 and up to 1"),
    ({"layer_rate": 1.1}, "layer_rate is 1.1; a number above 0 and up to 1"),
    ({"swap_share": float("nan")}, "swap_share is nan; a number above 0 and up to 1"),
    ({"swap_share": "0.1"}, "swap_share is '0.1'; a number above 0 and up to 1"),
    ({"noise": -0.1}, "noise is -0.1; a number from 0 is accepted"),
    ({"noise": float("inf")}, "noise is inf; a number from 0"),
  ],
)
def test_operators_refuse(fields, message):
  with pytest.raises(ValueError, match=message):
    EvolutionSettings(**fields)


def test_operators_at_their_limits():
  EvolutionSettings(population=2, elites=1, tournament=2, layer_rate=1.0, swap_share=1.0, noise=0)


def test_every_method_has_an_algorithm():
  assert ("greedy", *ALGORITHMS) == METHODS
