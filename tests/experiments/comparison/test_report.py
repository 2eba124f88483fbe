"""Pictures of a comparison show what plans have, not what they were asked for."""

import types

import pytest

from experiments.comparison import report
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.task import sizes

LAYERS = [types.SimpleNamespace(name=n, params=p, macs=1) for n, p in (("a", 100), ("b", 300))]
RUNS = types.SimpleNamespace(layers=LAYERS, names=("b",))


def spent(unit, row, kept=8):
  return report._spent(RUNS, types.SimpleNamespace(unit=unit, kept=kept), row)


def test_average_bits_are_those_of_the_plan():
  assert spent("average bits", {"avg_bits": 4.0, "ratio": 0.75}) == 4.0


@pytest.mark.parametrize(("bits", "share"), [(8, 1.0), (4, 0.5), (2, 0.25)])
def test_size_is_that_of_the_layers_that_may_be_lowered(bits, share):
  row = sizes(LAYERS, {"b": bits}, 8, FLOAT)
  assert spent("size", row, kept=FLOAT) == pytest.approx(share)


@pytest.mark.parametrize(("average", "share"), [(8, 1.0), (FLOAT, 0.0), (20, 0.5)])
def test_share_in_8_bits_follows_from_the_average(average, share):
  assert spent("share in 8 bits", {"avg_bits": average}) == pytest.approx(share)
