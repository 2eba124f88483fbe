"""The tables that a config asks for, and what is refused."""

import pytest

from configs.shared import comparisons
from experiments.comparison.tables import settings_of, tables_of
from flexiq_jax.methods import METHODS
from flexiq_jax.methods.layerwise import FLOAT

LAYERWISE = {"random", "clado", "clado_block", "clado_diagonal", "mpqco", "hawq"}


def config(**changes):
  made = comparisons.comparison("digits", "runlocal")
  made.comparison.tables = ("main", "clado_tensor", "clado_channel", "wide", "float8")
  made.comparison.update(changes)
  return made.lock()


def test_tables():
  main, tensor, channel, wide, float8 = found = tables_of(config())
  assert [s.name for s in found] == ["main", "clado_tensor", "clado_channel", "wide", "float8"]
  assert (main.bits, main.activation_bits, main.per_channel, main.kept) == ((4, 8), None, True, 8)
  assert set(main.methods) == set(METHODS) - set(comparisons.TRAINED)
  assert (tensor.bits, tensor.activation_bits, tensor.kept) == ((2, 4, 8), 8, FLOAT)
  assert (tensor.per_channel, channel.per_channel) == (False, True)
  # FlexiQ, uniform and QuantuneV2 have two precisions, or one.
  assert set(wide.methods) == set(tensor.methods) == LAYERWISE
  assert (float8.bits, float8.widths, float8.activation_bits) == ((8, FLOAT), (8,), None)
  assert (float8.per_channel, float8.kept) == (True, FLOAT)
  assert set(float8.methods) == {"quantune", "random", "clado_diagonal", "mpqco", "hawq"}
  assert all(table.widths == table.bits for table in found if table != float8)
  assert (main.label("clado"), wide.label("clado")) == ("clado", "wide/clado")


def test_quantune_needs_two_precisions():
  (main,) = tables_of(config(tables=("main",), bits=(4, 6, 8)))
  assert "quantune" not in main.methods


def test_budgets_are_ratios_of_rows():
  main, tensor, _, _, float8 = tables_of(
    config(averages=(7, 4.0, 5), sizes=(0.5, 0.25), int8_shares=(1, 0.25))
  )
  assert main.budgets == (4, 5, 7)
  assert [main.ratio(b) for b in main.budgets] == [1, 0.75, 0.25]
  assert [tensor.ratio(b) for b in tensor.budgets] == [0.25, 0.5]
  assert [float8.ratio(b) for b in float8.budgets] == [0.25, 1.0]
  for table in (main, tensor, float8):
    assert [table.budget(table.ratio(b)) for b in table.budgets] == [*table.budgets]


def test_limits():
  main, tensor, _, _, float8 = tables_of(config())
  assert (main.limit(5.0), tensor.limit(0.5)) == (5.0, 0.5)
  # A quarter at 8 bits and the others at 32.
  assert [float8.limit(share) for share in (0.0, 0.25, 1.0)] == [32, 26, 8]


def test_missed():
  main, tensor, _, _, float8 = tables_of(config())
  assert [main.missed(5.0, average) for average in (4.94, 4.96, 5.04, 5.06)] == [1, 0, 0, 1]
  assert not tensor.missed(0.5, 2.0)
  # 24 bits of the average are the whole share.
  assert [float8.missed(0.5, 20 + 24 * off) for off in (-0.06, -0.04, 0.04, 0.06)] == [1, 0, 0, 1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("clda",)}, "methods: 'clda' is not one of flexiq_greedy, flexiq"),
    ({"methods": ()}, "methods: empty; give some of"),
    ({"tables": ("main", "own")}, "tables: 'own' is not one of main, clado_tensor"),
    ({"averages": (3.9, 5.0)}, "averages: 3.9; 4..8 is accepted, the smallest feasible is 4"),
    ({"averages": (float("nan"),)}, "averages: nan; 4..8 is accepted"),
    ({"averages": ()}, "averages: empty; give numbers in 4..8"),
    ({"averages": (4.0,), "bits": (6, 8)}, r"averages: 4 with bits \(6, 8\) \(main\); 6..8 is"),
    ({"sizes": (0.2,)}, "sizes: 0.2; 0.25..1 is accepted, the smallest feasible is 0.25"),
    ({"int8_shares": (1.1,)}, "int8_shares: 1.1; 0..1 is accepted"),
    ({"int8_shares": (-0.25, 1.0)}, "int8_shares: -0.25; 0..1 is accepted"),
    ({"int8_shares": (True,)}, "int8_shares: True; 0..1 is accepted"),
    ({"int8_shares": ()}, "int8_shares: empty; give numbers in 0..1"),
    ({"bits": (4, 9)}, "bits: 9; widths of 2..8 are accepted"),
    ({"bits": (1, 8)}, "bits: 1; widths of 2..8 are accepted"),
    ({"bits": (4, 6)}, r"bits: \(4, 6\); at least two different widths, 8 among them"),
    ({"wide_bits": (8,)}, r"wide_bits: \(8,\); at least two different widths"),
    ({"clado_bits": (4, 4, 8)}, r"clado_bits: \(4, 4, 8\); at least two different widths"),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ValueError, match=f"^config.comparison.{message}"):
    tables_of(config(**changes))


def test_methods_stand_in_the_order_of_the_registry_and_others_behind():
  names = ("tests.methods.toys_for_test:CheapestFirst", "hawq", "uniform", "hawq")
  (main,) = tables_of(config(tables=("main",), methods=names))
  assert [*main.methods] == ["uniform", "hawq", "cheapest_first"]


def test_settings_are_those_of_the_config_or_the_methods_own():
  part = config(probes=5).comparison
  hawq = settings_of(part, METHODS["hawq"])
  assert (hawq.probes, hawq.block) == (5, part.block)
  with part.unlocked():
    del part.probes
  assert settings_of(part, METHODS["hawq"]).probes == 32
