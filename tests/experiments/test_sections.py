"""The tables that a config asks for, and what is refused."""

import pytest

from configs import common
from experiments import sections
from flexiq_jax.methods.layerwise import FLOAT


def config(**changes):
  made = common.comparison("digits", "runlocal")
  made.comparison.sections = ("main", "clado_tensor", "clado_channel", "wide")
  made.comparison.update(changes)
  return made.lock()


def test_sections():
  main, tensor, channel, wide = sections.of(config())
  assert [s.name for s in (main, tensor, channel, wide)] == [
    "main",
    "clado_tensor",
    "clado_channel",
    "wide",
  ]
  assert (main.bits, main.activation_bits, main.per_channel, main.kept) == ((4, 8), None, True, 8)
  assert set(main.methods) == set(sections.METHODS)
  assert (tensor.bits, tensor.activation_bits, tensor.kept) == ((2, 4, 8), 8, FLOAT)
  assert (tensor.per_channel, channel.per_channel) == (False, True)
  # FlexiQ, uniform and QuantuneV2 have two precisions, or one.
  assert set(wide.methods) == set(tensor.methods) == set(sections.LAYERWISE)
  assert (main.label("clado"), wide.label("clado")) == ("clado", "wide/clado")


def test_quantune_needs_two_precisions():
  (main,) = sections.of(config(sections=("main",), bits=(4, 6, 8)))
  assert "quantune" not in main.methods


def test_budgets_are_ratios_of_rows():
  main, tensor, *_ = sections.of(config(averages=(7, 4.0, 5), sizes=(0.5, 0.25)))
  assert main.budgets == (4, 5, 7)
  assert [main.ratio(b) for b in main.budgets] == [1, 0.75, 0.25]
  assert [tensor.ratio(b) for b in tensor.budgets] == [0.25, 0.5]
  for section in (main, tensor):
    assert [section.budget(section.ratio(b)) for b in section.budgets] == [*section.budgets]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("clda",)}, "methods: 'clda' is not one of flexiq_greedy, flexiq"),
    ({"methods": ()}, "methods: empty; give some of"),
    ({"sections": ("main", "own")}, "sections: 'own' is not one of main, clado_tensor"),
    ({"seeds": (0, -1)}, "seeds: -1 is not in 0.."),
    ({"seeds": ()}, "seeds: empty"),
    ({"averages": (3.9, 5.0)}, "averages: 3.9; 4..8 is accepted, the smallest feasible is 4"),
    ({"averages": (float("nan"),)}, "averages: nan; 4..8 is accepted"),
    ({"averages": ()}, "averages: empty; give numbers in 4..8"),
    ({"averages": (4.0,), "bits": (6, 8)}, r"averages: 4 with bits \(6, 8\) \(main\); 6..8 is"),
    ({"sizes": (0.2,)}, "sizes: 0.2; 0.25..1 is accepted, the smallest feasible is 0.25"),
    ({"bits": (4, 9)}, "bits: 9; widths of 2..8 are accepted"),
    ({"bits": (1, 8)}, "bits: 1; widths of 2..8 are accepted"),
    ({"bits": (4, 6)}, r"bits: \(4, 6\); at least two different widths, 8 among them"),
    ({"wide_bits": (8,)}, r"wide_bits: \(8,\); at least two different widths"),
    ({"clado_bits": (4, 4, 8)}, r"clado_bits: \(4, 4, 8\); at least two different widths"),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ValueError, match=f"^config.comparison.{message}"):
    sections.of(config(**changes))
