"""The benchmarks of searches: what they count and compare, and that they run."""

import json

import numpy as np
import pytest

from benchmarks import loading, population, search, torch_search
from flexiq_jax import orders
from flexiq_jax.orders import Schedule, Space
from flexiq_jax.search import SearchSettings

LEVELS = (0.25, 0.5)


@pytest.fixture(scope="module")
def tiny():
  return loading.random("resnet20", 8, depths=(1, 1), width=8, input_size=8)


def row(ratio, best, seconds, forwards):
  return {"ratio": ratio, "best": best, "seconds": seconds, "forwards": forwards}


PLAIN = [
  row(0.25, 9.0, 1.0, 10.0),
  row(0.25, 4.0, 2.0, 20.0),
  row(0.25, 4.0, 3.0, 30.0),
  row(0.5, 8.0, 6.0, 60.0),
]
OURS = [
  row(0.25, 5.0, 0.5, 3.0),
  row(0.25, 3.0, 1.0, 5.0),
  row(0.5, 8.5, 2.0, 7.0),
]


def test_reached_is_the_first_row_of_the_level_that_is_as_good():
  assert search.reached(PLAIN, 0.25, 4.0) == search.Cost(2.0, 20.0)
  assert search.reached(PLAIN, 0.25, 100.0) == search.Cost(1.0, 10.0)
  assert search.reached(PLAIN, 0.5, 8.5) == search.Cost(6.0, 60.0)
  # A lower level that is as good does not count, and neither does a later level.
  assert search.reached(PLAIN, 0.5, 5.0) is None
  assert search.reached(PLAIN, 0.25, 3.9) is None


def test_reached_forgives_the_rounding_of_float32_and_no_more():
  value = 0.1
  rows = [row(0.25, value, 1.0, 1.0)]
  assert float(np.float32(value * 7)) < 0.7  # what evolution keeps may be below the same mask's
  assert search.reached([row(0.25, 0.7, 1.0, 1.0)], 0.25, float(np.float32(0.7))) is not None
  assert search.reached(rows, 0.25, value * (1 - 1e-5)) is None


def test_compare_takes_the_plain_search_when_it_first_was_there():
  compared = search.compare(PLAIN, OURS, LEVELS)
  low, high = compared[0.25], compared[0.5]
  # Evolution stood still from 2 s to the end of its level at 3 s, which is not counted against it.
  assert low["evolution"]["needed"] == search.Cost(2.0, 20.0)
  assert low["evolution"]["end"] == search.Cost(3.0, 30.0)
  assert low["gram"]["reached"] == search.Cost(1.0, 5.0)
  assert (low["seconds_ratio"], low["forwards_ratio"]) == (2.0, 4.0)
  assert high["gram"]["reached"] is None
  assert high["gram"]["end"] == search.Cost(2.0, 7.0)
  assert "seconds_ratio" not in high


def test_summary_spreads_over_the_seeds_that_reached_the_fitness():
  other = [*PLAIN[:3], row(0.5, 9.0, 6.0, 70.0)]
  seeds = [search.compare(PLAIN, OURS, LEVELS), search.compare(other, OURS, LEVELS)]
  found = search.summary(seeds)
  assert found[0.25]["reached"] == 2
  assert found[0.5]["reached"] == 1
  assert found[0.5]["forwards_ratio"] == {"median": 10.0, "min": 10.0, "max": 10.0}
  assert found[0.5]["evolution_fitness"] == {"median": 8.5, "min": 8.0, "max": 9.0}
  never = search.summary([search.compare(PLAIN, OURS, LEVELS)])[0.5]
  assert never["reached"] == 0 and never["seconds_ratio"] is None


def test_line_through_points_on_a_line_and_off_it():
  line = population.fit_line([1, 2, 4, 8], [0.7, 0.9, 1.3, 2.1])
  assert line.fixed == pytest.approx(0.5)
  assert line.slope == pytest.approx(0.2)
  assert line.residual == pytest.approx(0, abs=1e-12)
  assert population.fit_line([1, 2, 4, 8], [1, 4, 16, 64]).residual > 0.3


def test_runs_take_turns_and_the_first_round_is_not_counted():
  calls = []
  runs = {name: lambda name=name: calls.append(name) for name in "ab"}
  seconds = population.in_turn(runs, rounds=2, pause=0)
  assert calls == ["a", "b"] * 3
  assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_of_times_in_the_same_round():
  found = population.speeds({"population": [1.0, 2.0, 4.0], "other": [3.0, 2.0, 40.0]}, count=8)
  assert found["population"] == {
    "individuals_per_second": 4.0,
    "time_relative_to_population": 1.0,
  }
  assert found["other"]["time_relative_to_population"] == 3.0  # of medians it would be 1.5
  assert found["other"]["individuals_per_second"] == pytest.approx(8 / 3)


def test_differences_forgive_single_images_and_refuse_another_network():
  ours = np.ones((2, 8), np.float32)
  few = ours.copy()
  few[0, 0] = 2
  found = population.differences({"population": ours, "few": few})["few"]
  assert found["median"] == 0
  assert found["worst_individual"] == pytest.approx(1 / 8)
  assert found["mean"] == pytest.approx(1 / 16)
  with pytest.raises(RuntimeError, match=r"all: distances differ .* 0\.01"):
    population.differences({"population": ours, "all": ours * np.float32(1.01)})


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    (population, ["--models", "resnet20,resnet19"], "--models: resnet19; resnet20, vit_cifar10"),
    (population, ["--population", "1"], "--population: 1; at least 2"),
    (population, ["--rounds", "0"], "--rounds: 0; at least 1"),
    (search, ["--seeds", "0,one"], "--seeds: '0,one'"),
    (search, ["--images", "0"], "--images: 0; at least 1"),
    (search, ["--model", "resnet19"], "invalid choice: 'resnet19'"),
  ],
)
def test_wrong_arguments_are_named(script, arguments, message, capsys):
  with pytest.raises(SystemExit) as ended:
    script.parse(arguments)
  assert ended.value.code == 2
  assert message in capsys.readouterr().err


def test_search_skips_without_data(monkeypatch, tmp_path, capsys):
  monkeypatch.delenv("FLEXIQ_DATA", raising=False)
  search.main(["--json", str(tmp_path / "search.json")])
  assert "skipped" in capsys.readouterr().out
  assert not [*tmp_path.iterdir()]


def test_ways_of_evaluation_agree_and_nothing_compiles_again(tiny, capsys):
  document = population.measure(tiny, population=4, rounds=1, peer=False, pause=0)
  assert set(document["speed"]) == {"population", "one_by_one"}
  assert (document["traces"], document["later_traces"]) == (1, 0)
  assert document["distance_differs"]["one_by_one"]["worst_individual"] < 1e-5
  points = document["scaling"]["points"]
  assert [(p["individuals"], p["images"]) for p in points] == [
    (individuals, images) for individuals in (2, 4, 8) for images in (2, 4, 8)
  ]
  assert [p["work"] for p in points] == [p["individuals"] * p["images"] / 8 for p in points]
  json.dumps(document, allow_nan=False)
  population.show("tiny", document, tiny.pretrained)
  assert "tiny, random weights: 4 individuals" in capsys.readouterr().out


@pytest.mark.slow
def test_searches_are_compared_level_by_level(tiny):
  lines = []
  plain = SearchSettings(method="evolution", levels=LEVELS, population=6, elites=2, generations=1)
  ours = SearchSettings(levels=LEVELS, candidates=2)
  document = search.measure(tiny, plain, ours, [3], lines.append)
  (run,) = document["seeds"]
  for level in LEVELS:
    entry = run["levels"][level]
    assert entry["evolution"]["fitness"] == pytest.approx(
      [r["best"] for r in run["rows"]["evolution"] if r["ratio"] == level][-1]
    )
    as_good = entry["gram"]["fitness"] <= entry["evolution"]["fitness"] * (1 + 1e-6)
    assert as_good == (entry["gram"]["reached"] is not None) == ("seconds_ratio" in entry)
    assert sum(line.startswith(f"seed 3: {level:.0%}: greedy") for line in lines) == 1
  # Of greedy's masks the lowest is among both searches' seeds.
  first = run["levels"][LEVELS[0]]
  for method in ("evolution", "gram"):
    assert first[method]["fitness"] <= document["greedy"][LEVELS[0]] * (1 + 1e-6)
  assert len(search.summary_lines(document)) == 1 + len(LEVELS)


def test_peer_searches_masks_of_the_level_and_never_gets_worse():
  space = Space.create(["a", "b", "c"], [[4] * 6, [4] * 5 + [1], [4] * 4], [3, 5, 2])
  rng = np.random.default_rng(0)
  effects = rng.normal(size=(space.total, 4))
  fewest, most = int(np.ceil(space.cost.sum() / 2)), int(space.cost.sum())
  seen = []

  def fitness(masks):
    seen.append(masks)
    return np.square(masks @ effects).sum(axis=1)

  scores = np.square(effects).sum(axis=1)
  peer = torch_search.Evolution(fitness, space, scores, 0.5, population=24, elites=2)
  greedy = Schedule(space, orders.greedy(space, scores)).mask(0.5)
  assert peer.best <= fitness(greedy[None])[0]
  best = [peer.best]
  for _ in range(20):
    peer.step()
    best.append(peer.best)
  assert best == sorted(best, reverse=True)
  assert best[-1] < best[0]
  assert all(len(masks) == 22 for masks in seen[2:])
  costs = np.concatenate(seen) @ space.cost
  assert costs.min() >= fewest
  assert costs.max() < min(fewest + space.cost.max(), most)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_peer_computes_the_same_distances(tiny):
  pytest.importorskip("torch", reason="torch is not installed")
  theirs = torch_search.TorchFitness(tiny.network, tiny.model, tiny.space, tiny.images)
  fitness = population.Fitness(tiny.network, tiny.model, tiny.space, tiny.images, block=4)
  rng = np.random.default_rng(0)
  masks = rng.random((6, tiny.space.total)) < 0.5
  masks[0], masks[1] = False, True
  ours, found = fitness.per_example(masks), theirs.per_image(masks)
  assert not found[0].any()
  # Of most images: float32 sums round some activations to the other side.
  np.testing.assert_allclose(np.median(found[1:] / ours[1:], axis=1), 1, rtol=1e-4)
  np.testing.assert_allclose(theirs(masks), found.mean(axis=1), rtol=1e-6)
