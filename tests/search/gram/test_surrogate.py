"""The quadratic model against explicit effects, its minima against all masks, and their orders."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.orders import Schedule, Space
from flexiq_jax.orders.schedule import threshold
from flexiq_jax.search.gram import annealing
from flexiq_jax.search.gram.surrogate import Quadratic, anneal, arrange, fill, ledoit_wolf

TOTAL, STEPS = 12, 2048
NOTHING = np.zeros(TOTAL, bool)
ALL = np.array(list(itertools.product([False, True], repeat=TOTAL)))
UNEVEN = Space.create(("a", "b", "c"), [[4, 4, 4, 4, 1], [4, 4, 2], [4, 4, 4, 3]], [10, 25, 60])


def effects_of(seed, total=TOTAL):
  """Correlated effects of going to 4 bits, float64 `[T, 20]`: a few directions are shared."""
  rng = np.random.default_rng(seed)
  shared = rng.normal(size=(total, 3)) @ rng.normal(size=(3, 20))
  return (rng.normal(size=(total, 20)) + shared) * rng.lognormal(sigma=0.5, size=(total, 1))


def distance(effects, masks):
  return np.square(np.asarray(masks, float) @ effects).sum(axis=-1)


def quadratic_of(effects, base):
  """The model around a base, from the effects themselves."""
  r = effects[base].sum(axis=0)
  leaving = np.where(base, -1.0, 1.0)[:, None] * effects
  return Quadratic(base, float(r @ r), leaving @ r, leaving @ leaving.T)


def reachable(space, ratio, masks, frozen=None):
  """By the definition: some free group inside is the one that reaches the threshold."""
  goal, cost = threshold(space, ratio), masks @ space.cost
  free = masks if frozen is None else masks & ~frozen
  without_last = np.where(free, cost[:, None] - space.cost, np.iinfo(np.int64).max).min(axis=1)
  return (cost >= goal) & (without_last < goal)


def filled(quadratic, space, ratio, inside):
  mask = inside.copy()
  mask[fill(quadratic, space, ratio, inside)] = True
  return mask


# The model.


@pytest.mark.parametrize("seed", range(3))
def test_predicts_the_distance_of_effects_that_add(seed):
  effects, base = effects_of(seed), np.random.default_rng(seed).random(TOTAL) < 0.5
  quadratic = quadratic_of(effects, base)
  np.testing.assert_allclose(quadratic.predict(ALL), distance(effects, ALL), rtol=1e-9, atol=1e-9)
  assert quadratic.predict(base) == pytest.approx(distance(effects, base))
  assert quadratic.predict(ALL.reshape(2, -1, TOTAL)).shape == (2, 2048)


def test_moved_is_the_same_model_around_another_base():
  effects, rng = effects_of(0), np.random.default_rng(0)
  first, second = rng.random((2, TOTAL)) < 0.5
  moved, expected = quadratic_of(effects, first).moved(second), quadratic_of(effects, second)
  np.testing.assert_array_equal(moved.base, second)
  for field in ("value", "gradient", "gram"):
    np.testing.assert_allclose(getattr(moved, field), getattr(expected, field), atol=1e-9)
  shrunk = quadratic_of(effects, first).toward_diagonal(0.3)  # no explicit effects behind it
  np.testing.assert_allclose(shrunk.moved(second).predict(ALL), shrunk.predict(ALL), atol=1e-9)


def test_toward_diagonal_shrinks_what_is_off_the_diagonal():
  quadratic = quadratic_of(effects_of(0), NOTHING)
  before = quadratic.gram.copy()
  shrunk = quadratic.toward_diagonal(0.25).gram
  np.testing.assert_array_equal(np.diag(shrunk), np.diag(before))
  np.testing.assert_allclose(shrunk[0, 1:], 0.75 * before[0, 1:])
  np.testing.assert_array_equal(quadratic.gram, before)
  np.testing.assert_array_equal(quadratic.toward_diagonal(1).gram, np.diag(np.diag(before)))
  with pytest.raises(ValueError, match=r"share: 1\.5 is not in 0\.\.1"):
    quadratic.toward_diagonal(1.5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"base": np.zeros(2)}, r"base: float64 of shape \(2,\), expected bool of \(2,\)"),
    ({"base": [False, True]}, "base: list, expected a NumPy array"),
    ({"value": np.nan}, "value: not all finite"),
    ({"gradient": np.zeros(3)}, r"gradient: shape \(3,\), expected \(2,\)"),
    ({"gram": np.zeros((2, 3))}, r"gram: shape \(2, 3\), expected \(2, 2\)"),
    ({"gram": np.array([[1, np.inf], [0, 1]])}, "gram: not all finite"),
    ({"gram": np.array([[1.0, 0.5], [0.0, 1.0]])}, r"gram: differs from its transpose by 0\.5"),
  ],
)
def test_a_model_that_does_not_fit_is_refused(fields, message):
  good = {"base": np.zeros(2, bool), "value": 0.0, "gradient": np.zeros(2), "gram": np.eye(2)}
  Quadratic(**good)
  with pytest.raises(ValueError, match=message):
    Quadratic(**(good | fields))


# Shrinkage.


def sampled(samples):
  """Mean and mean square of the matrices of samples `[N, T, D]`, and the matrices."""
  matrices = np.einsum("ntd,nud->ntu", samples, samples)
  return matrices.mean(axis=0), np.square(matrices).mean(axis=0), matrices


def test_ledoit_wolf_by_its_formula():
  mean, squares, matrices = sampled(np.random.default_rng(0).normal(size=(9, 5, 2)) + 0.7)
  noise, energy = 0.0, 0.0
  for i, j in itertools.permutations(range(5), 2):
    noise += np.var([a[i, j] for a in matrices]) / 9
    energy += mean[i, j] ** 2
  assert 0.05 < noise / energy < 0.95
  assert ledoit_wolf(mean, squares, 9) == pytest.approx(noise / energy)


def test_ledoit_wolf_trusts_many_samples_and_shrinks_noise():
  rng = np.random.default_rng(0)
  mixing = np.eye(6) + 0.5  # correlated groups
  samples = np.einsum("tu,nud->ntd", mixing, rng.normal(size=(4000, 6, 1)))
  shares = [ledoit_wolf(*sampled(samples[:count])[:2], count) for count in (20, 4000)]
  assert 10 * shares[1] < shares[0] < 0.5
  assert shares[1] < 0.01
  mean, squares, _ = sampled(rng.normal(size=(8, 40, 1)))  # the truth is diagonal
  assert ledoit_wolf(mean, squares, 8) > 0.8
  assert ledoit_wolf(np.zeros((2, 2)), np.ones((2, 2)), 8) == 1
  assert ledoit_wolf(np.eye(2), np.eye(2), 8) == 0  # nothing to shrink
  with pytest.raises(ValueError, match="count: 1 samples; expected at least 2"):
    ledoit_wolf(mean, squares, 1)
  with pytest.raises(ValueError, match=r"squares_mean: shape \(40,\), expected \(40, 40\)"):
    ledoit_wolf(mean, squares[0], 8)


# Greedy: fill and arrange.


@pytest.mark.parametrize("seed", range(3))
def test_fill_takes_the_least_increase_per_cost_again_and_again(seed):
  effects, rng = effects_of(seed), np.random.default_rng(seed)
  quadratic = quadratic_of(effects, rng.random(TOTAL) < 0.5)
  inside = np.isin(np.arange(TOTAL), rng.choice(TOTAL, 2, replace=False))
  mask = inside.copy()
  for group in fill(quadratic, UNEVEN, 0.6, inside):
    assert mask @ UNEVEN.cost < threshold(UNEVEN, 0.6)
    after = distance(effects, mask | np.eye(TOTAL, dtype=bool)) - distance(effects, mask)
    assert group == np.argmin(np.where(mask, np.inf, after / UNEVEN.cost))
    mask[group] = True
  assert mask @ UNEVEN.cost >= threshold(UNEVEN, 0.6)
  assert not len(fill(quadratic, UNEVEN, 0.6, mask))
  assert fill(quadratic, UNEVEN, 1.0, NOTHING).shape == (TOTAL,)


def test_arrange_without_levels_is_greedy():
  quadratic = quadratic_of(effects_of(0), NOTHING)
  np.testing.assert_array_equal(
    arrange(quadratic, UNEVEN, [], []), fill(quadratic, UNEVEN, 1.0, NOTHING)
  )


def test_arrange_ends_a_level_with_the_last_group_that_it_can_do_without():
  space = Space.create(("a", "b"), [[1, 1], [1, 1]], [1, 3])  # costs 1 1 3 3
  effects = np.diag([2.0, 3.0, 1.0, 10.0])  # per cost 4, 9, 1/3, 33
  quadratic = quadratic_of(effects, np.zeros(4, bool))
  np.testing.assert_array_equal(arrange(quadratic, space, [], []), [2, 0, 1, 3])
  mask = np.array([True, True, True, False])  # a cost of 5 for one of 4: only group 2 can be last
  np.testing.assert_array_equal(arrange(quadratic, space, [mask], [0.5]), [0, 1, 2, 3])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_levels_of_annealing_are_what_the_schedule_has(data):
  channels = data.draw(st.lists(st.integers(1, 8), min_size=TOTAL, max_size=TOTAL))
  macs = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=2))
  space = Space.create(("a", "b"), [channels[:7], channels[7:]], macs)
  ratios = sorted(data.draw(st.lists(st.integers(0, 20), min_size=3, max_size=3)))
  ratios = [ratio / 20 for ratio in ratios]
  seed = data.draw(st.integers(0, 99))
  quadratic = quadratic_of(effects_of(seed), NOTHING)
  below, levels = NOTHING, []
  for ratio in ratios:
    start = filled(quadratic, space, ratio, below)
    arguments = {"frozen": below, "start": start, "limits": [TOTAL] * 2, "steps": 256}
    masks, predicted = anneal(jax.random.key(seed), quadratic, space, ratio, **arguments)
    for mask in masks:
      order = arrange(quadratic, space, [*levels, mask], ratios[: len(levels) + 1])
      np.testing.assert_array_equal(Schedule(space, order).mask(ratio), mask)
    below = masks[predicted.argmin()]
    levels.append(below)
  schedule = Schedule(space, arrange(quadratic, space, levels, ratios))
  for ratio, level in zip(ratios, levels, strict=True):
    np.testing.assert_array_equal(schedule.mask(ratio), level)


@pytest.mark.parametrize(
  ("masks", "ratios", "message"),
  [
    ([[1, 1, 0, 0]], [0.25, 0.5], r"ratios: \[0\.25, 0\.5\] for 1 masks; expected as many"),
    ([[1, 1, 0, 0], [1, 1, 1, 0]], [0.5, 0.25], "ratios: .*ascending"),
    ([[1, 0, 0, 0], [0, 1, 1, 0]], [0.25, 0.5], r"masks\[1\]: lacks 1 groups of the level below"),
    ([[1, 0, 0, 0]], [0.5], r"masks\[0\]: falls short of ratio 0\.5 by a cost of 1"),
    ([[1, 1, 1, 0]], [0.5], r"masks\[0\]: over ratio 0\.5 by a cost of 1, at least one whole"),
    ([[1, 1, 0, 0], [1, 1, 1, 0]], [0.5, 0.5], r"masks\[1\]: over ratio"),
    ([[1, 0, 0, 0]], [0], r"masks\[0\]: over ratio"),
    ([[1, 0, 0]], [0.25], r"masks\[0\]: bool of shape \(3,\), expected bool of \(4,\)"),
  ],
)
def test_arrange_refuses_what_no_schedule_has(masks, ratios, message):
  space = Space.create(("a",), [[1] * 4], [1])
  quadratic = quadratic_of(effects_of(0, 4), np.zeros(4, bool))
  with pytest.raises(ValueError, match=message):
    arrange(quadratic, space, [np.array(mask, bool) for mask in masks], ratios)


# Annealing.


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_annealing_finds_the_optimum_of_small_problems(ratio):
  """Among all reachable masks, within each limit around a random base; the better of two chains.

  Costs are very uneven: tight limits leave islands of masks, which one chain may not get off.
  """
  fits, greedy_hits = reachable(UNEVEN, ratio, ALL), 0
  limits = np.array([2, 4, 6, TOTAL])
  for seed in range(5):
    effects, rng = effects_of(seed), np.random.default_rng(seed)
    base = ALL[rng.choice(np.flatnonzero(fits))]
    values, flips = distance(effects, ALL), (base != ALL).sum(axis=1)
    masks, predicted = anneal(
      jax.random.key(seed),
      quadratic_of(effects, base),
      UNEVEN,
      ratio,
      frozen=NOTHING,
      start=base,
      limits=np.repeat(limits, 2),
      steps=STEPS,
    )
    optima = [values[fits & (flips <= limit)].min() for limit in limits]
    np.testing.assert_allclose(predicted.reshape(4, 2).min(axis=1), optima, rtol=1e-9)
    np.testing.assert_allclose(distance(effects, masks), predicted, rtol=1e-9)
    assert ((masks != base).sum(axis=1) <= np.repeat(limits, 2)).all()
    greedy = filled(quadratic_of(effects, NOTHING), UNEVEN, ratio, NOTHING)
    greedy_hits += distance(effects, greedy) <= optima[-1] * (1 + 1e-9)
  assert greedy_hits < 5  # it was not trivial


def test_frozen_groups_stay_on_their_side_and_limits_count_them():
  ratio, effects, rng = 0.5, effects_of(0), np.random.default_rng(0)
  base = ALL[rng.choice(np.flatnonzero(reachable(UNEVEN, ratio, ALL)))]
  values, flips = distance(effects, ALL), (base != ALL).sum(axis=1)
  frozen = np.arange(TOTAL) % 3 == 0
  sides, fits = ALL[:, frozen], reachable(UNEVEN, ratio, ALL, frozen)
  one_moved = (sides != base[frozen]).sum(axis=1) == 1
  start = ALL[fits & one_moved & (flips == 3) & sides.any(axis=1)][0]
  limits = [3, 4, 5, TOTAL]
  arguments = {"frozen": frozen, "start": start, "limits": limits, "steps": STEPS}
  quadratic = quadratic_of(effects, base)
  masks, predicted = anneal(jax.random.key(0), quadratic, UNEVEN, ratio, **arguments)
  assert (masks[:, frozen] == start[frozen]).all()
  fits &= (sides == start[frozen]).all(axis=1)
  optima = [values[fits & (flips <= limit)].min() for limit in limits]
  assert (np.diff(optima) < 0).all()  # each limit matters
  np.testing.assert_allclose(predicted, optima, rtol=1e-9)
  everything = {**arguments, "frozen": ~NOTHING}
  masks, predicted = anneal(jax.random.key(0), quadratic, UNEVEN, ratio, **everything)
  np.testing.assert_array_equal(masks, np.tile(start, (4, 1)))
  np.testing.assert_allclose(predicted, distance(effects, start))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_and_everything_have_one_mask(ratio):
  quadratic, start = quadratic_of(effects_of(0), NOTHING), np.full(TOTAL, bool(ratio))
  arguments = {"frozen": NOTHING, "start": start, "limits": [TOTAL] * 4, "steps": STEPS}
  masks, predicted = anneal(jax.random.key(0), quadratic, UNEVEN, ratio, **arguments)
  np.testing.assert_array_equal(masks, np.tile(start, (4, 1)))
  np.testing.assert_allclose(predicted, quadratic.predict(start))


@pytest.mark.parametrize("seed", range(4))
def test_rounding_makes_nothing_worse(seed):
  """Pairs of groups that float32 cannot tell apart, and a start that has the better one of each."""
  rng = np.random.default_rng(seed)
  effects = np.repeat(rng.normal(size=(TOTAL // 2, 20)), 2, axis=0)
  effects[1::2] *= 1 + 1e-9
  space = Space.create(("a",), [[1] * TOTAL], [1])
  values = np.where(ALL.sum(axis=1) == 6, distance(effects, ALL), np.inf)
  start = ALL[values.argmin()]
  quadratic = quadratic_of(effects, rng.permutation(start))
  arguments = {"frozen": NOTHING, "start": start, "limits": [TOTAL] * 4, "steps": STEPS}
  _, predicted = anneal(jax.random.key(seed), quadratic, space, 0.5, **arguments)
  assert (predicted <= quadratic.predict(start)).all()


def test_annealing_beats_greedy_and_keeps_limits():
  total, ratio = 60, 0.5
  space = Space.create(("a", "b"), [[4] * 29 + [1], [4] * 28 + [3, 2]], [9, 20])
  limits, nothing = [2, 8, total, total], np.zeros(total, bool)
  for seed in range(4):
    effects = effects_of(seed, total)
    base = filled(quadratic_of(effects, nothing), space, ratio, nothing)
    quadratic = quadratic_of(effects, base)
    arguments = {"frozen": nothing, "start": base, "limits": limits}
    masks, predicted = anneal(jax.random.key(seed), quadratic, space, ratio, **arguments)
    flips = (masks != base).sum(axis=1)
    assert (flips <= limits).all()
    assert reachable(space, ratio, masks).all()
    np.testing.assert_allclose(predicted, distance(effects, masks), rtol=1e-9)
    assert predicted[0] < quadratic.value and predicted[1] < predicted[0]
    # Two flips: the best of all pairs.
    pairs = base ^ np.array(
      [
        np.isin(np.arange(total), p)
        for p in itertools.combinations_with_replacement(range(total), 2)
      ]
    )
    best = distance(effects, pairs[reachable(space, ratio, pairs)]).min()
    assert predicted[0] == pytest.approx(best)
    assert predicted[2:].max() < 0.75 * quadratic.value


def test_units_of_the_distance_do_not_matter():
  base = filled(quadratic_of(effects_of(0), NOTHING), UNEVEN, 0.5, NOTHING)
  found = []
  for factor in (1e-15, 1.0, 1e15):
    quadratic = quadratic_of(factor * effects_of(0), base)
    arguments = {"frozen": NOTHING, "start": base, "limits": [TOTAL] * 4, "steps": STEPS}
    found.append(anneal(jax.random.key(0), quadratic, UNEVEN, 0.5, **arguments))
    np.testing.assert_array_equal(found[-1][0], found[0][0])
    np.testing.assert_allclose(found[-1][1] / factor**2, found[0][1] * 1e30, rtol=1e-6)
  flat = Quadratic(base, 1.0, np.zeros(TOTAL), np.zeros((TOTAL, TOTAL)))
  masks, predicted = anneal(jax.random.key(0), flat, UNEVEN, 0.5, **arguments)
  np.testing.assert_array_equal(masks, np.tile(base, (4, 1)))
  np.testing.assert_array_equal(predicted, np.ones(4))


def test_annealing_is_reproducible_and_compiles_once(monkeypatch):
  traces, original = [], annealing.run.__wrapped__

  def counted(*arrays, steps):
    traces.append(steps)
    return original(*arrays, steps=steps)

  monkeypatch.setattr(annealing, "run", jax.jit(counted, static_argnames="steps"))
  total, results = 30, []
  space = Space.create(("a", "b"), [[4] * 14 + [1], [4] * 14 + [3]], [9, 20])
  nothing = np.zeros(total, bool)
  quadratic = quadratic_of(effects_of(3, total), nothing)
  for seed, ratio, frozen in [(0, 0.5, 0), (0, 0.5, 0), (1, 0.5, 0), (0, 0.25, 4)]:
    inside = np.arange(total) < frozen
    arguments = {"frozen": inside, "start": filled(quadratic, space, ratio, inside)}
    arguments |= {"limits": [total] * 3, "steps": 300}
    results.append(anneal(jax.random.key(seed), quadratic, space, ratio, **arguments))
  assert traces == [300]
  for one, other in zip(results[0], results[1], strict=True):
    np.testing.assert_array_equal(one, other)
  assert not np.array_equal(results[0][0], results[2][0])
  assert len(np.unique(results[0][0], axis=0)) > 1  # chains do not share their draws


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"limits": []}, r"limits: \[\]; expected at least one, and none below 2"),
    ({"limits": [12, 1]}, r"limits: \[12, 1\]; expected at least one, and none below 2"),
    ({"steps": 0}, "steps: 0; expected at least 1"),
    ({"start": NOTHING}, r"start: falls short of ratio 0\.5"),
    ({"start": ~NOTHING}, r"start: over ratio 0\.5 by a cost of .*, at least one whole group"),
    ({"start": np.zeros(3, bool)}, r"start: bool of shape \(3,\), expected bool of \(12,\)"),
    ({"frozen": np.zeros(TOTAL)}, r"frozen: float64 of shape \(12,\), expected bool"),
  ],
)
def test_annealing_refuses(changes, message):
  fits = ALL[reachable(UNEVEN, 0.5, ALL)]
  start = fits[0]
  base = fits[(fits != start).sum(axis=1) == 2][0]
  arguments = {"frozen": NOTHING, "start": start, "limits": [TOTAL], "steps": STEPS}
  quadratic = quadratic_of(effects_of(0), base)
  with pytest.raises(ValueError, match=message):
    anneal(jax.random.key(0), quadratic, UNEVEN, 0.5, **(arguments | changes))
