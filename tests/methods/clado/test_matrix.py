"""CLADO's algebra against models whose loss is exactly quadratic, and against its definition."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.methods.clado import matrix
from flexiq_jax.methods.program import Choices, Problem, solve
from tests.methods.clado.losses_for_test import average

NAMES, BITS = ("a", "b", "c", "d"), (2, 4, 8)
CHOICES = Choices.create(NAMES, BITS, {"size": np.outer([10, 30, 20, 5], BITS)})
N = CHOICES.total
SEEDS = st.integers(0, 2**31)


def everything():
  return (dict(zip(NAMES, w, strict=True)) for w in itertools.product(BITS, repeat=len(NAMES)))


class Quadratic:
  """A loss `base + w' H w / 2` of the errors w of four layers' weights, 3 numbers in each layer."""

  def __init__(self, seed, base=0.7):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(12, 12))
    self.hessian, self.base = root @ root.T, base
    self.errors = rng.normal(size=(len(NAMES), len(BITS), 3)) * (0.5 ** np.array(BITS))[:, None]

  def loss(self, bits):
    w = np.zeros((len(NAMES), 3))
    for name, width in bits.items():
      w[NAMES.index(name)] = self.errors[NAMES.index(name), BITS.index(width)]
    return self.base + 0.5 * w.ravel() @ self.hessian @ w.ravel()

  def losses(self):
    options = list(itertools.product(NAMES, BITS))
    singles = np.array([self.loss(dict([k])) for k in options])
    pairs = np.full((N, N), np.nan)
    for (i, k), (j, m) in itertools.combinations(enumerate(options), 2):
      if k[0] != m[0]:
        pairs[i, j] = self.loss(dict([k, m]))
    return matrix.Losses(self.base, singles, pairs)


def increase(g, bits):
  """The predicted increase of the loss, x' G x / 2."""
  return Problem(choices=CHOICES, objective=g).value(bits) / 2


def random_losses(seed):
  rng = np.random.default_rng(seed)
  return matrix.Losses(1.0, 1 + rng.normal(size=N), 1 + rng.normal(size=(N, N)))


# The matrix.


@pytest.mark.parametrize("seed", range(3))
def test_recovers_the_hessian_of_a_quadratic_loss(seed):
  model = Quadratic(seed)
  g = matrix.matrix(CHOICES, model.losses())
  effects = np.zeros((N, 12))
  for k in range(N):
    i, b = divmod(k, len(BITS))
    effects[k, 3 * i : 3 * i + 3] = model.errors[i, b]
  expected = effects @ model.hessian @ effects.T
  same_layer = CHOICES.layer[:, None] == CHOICES.layer
  expected[same_layer & ~np.eye(N, dtype=bool)] = 0
  np.testing.assert_allclose(g, expected, atol=1e-10)


def test_predicts_every_choice_of_a_quadratic_loss():
  model = Quadratic(3)
  g = matrix.matrix(CHOICES, model.losses())
  for bits in everything():
    assert increase(g, bits) == pytest.approx(model.loss(bits) - model.base)


@pytest.mark.parametrize("clip", [False, True])
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_predicts_pairs_exactly_whatever_the_loss(clip, seed):
  """Also with clipped singles: what a single lost goes to its interactions."""
  losses = random_losses(seed)
  g = matrix.matrix(CHOICES, losses, clip=clip)
  for k, m in itertools.combinations(range(N), 2):
    x = np.zeros(N)
    x[[k, m]] = 1
    if CHOICES.layer[k] != CHOICES.layer[m]:
      assert x @ g @ x / 2 == pytest.approx(losses.pairs[k, m] - losses.base)
  singles = losses.singles - losses.base
  np.testing.assert_allclose(np.diag(g), 2 * (np.maximum(singles, 0) if clip else singles))


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_is_symmetric_and_zero_inside_a_layer(seed):
  g = matrix.matrix(CHOICES, random_losses(seed))
  np.testing.assert_array_equal(g, g.T)
  same_layer = CHOICES.layer[:, None] == CHOICES.layer
  assert not g[same_layer & ~np.eye(N, dtype=bool)].any()
  assert np.count_nonzero(g) == N + (~same_layer).sum()


def test_average_over_batches_is_the_mean_over_examples():
  examples = [random_losses(seed) for seed in range(7)]
  whole = average(examples, [1] * 7)
  parts = [average(examples[:2], [1, 1]), average(examples[2:], [1] * 5)]
  from_batches = average(parts, [2, 5])
  np.testing.assert_allclose(
    matrix.matrix(CHOICES, from_batches), matrix.matrix(CHOICES, whole), atol=1e-12
  )
  pairs = np.mean([e.pairs for e in examples], axis=0)
  np.testing.assert_allclose(whole.pairs, pairs)


def test_unread_pairs_may_be_anything():
  losses = random_losses(0)
  noise = np.where(np.triu(CHOICES.layer[:, None] != CHOICES.layer, 1), losses.pairs, np.nan)
  other = matrix.Losses(losses.base, losses.singles, noise)
  np.testing.assert_array_equal(matrix.matrix(CHOICES, losses), matrix.matrix(CHOICES, other))


@pytest.mark.parametrize(
  ("losses", "message"),
  [
    (matrix.Losses(0, np.zeros(N - 1), np.zeros((N, N))), r"singles: shape \(11,\), expected"),
    (matrix.Losses(0, np.zeros(N), np.zeros((N, 1))), r"pairs: shape \(12, 1\), expected"),
    (matrix.Losses(0, np.full(N, np.inf), np.zeros((N, N))), "singles: 12 losses are not finite"),
    (matrix.Losses(0, np.zeros(N), np.full((N, N), np.nan)), "pairs: 54 losses are not finite"),
    (matrix.Losses(np.nan, np.zeros(N), np.zeros((N, N))), "singles: 12 losses are not finite"),
  ],
)
def test_losses_that_do_not_fit_are_refused(losses, message):
  with pytest.raises(ValueError, match=message):
    matrix.matrix(CHOICES, losses)


# Variants.


def test_diagonal_variant_adds_singles():
  losses = random_losses(1)
  c = matrix.diagonal(matrix.matrix(CHOICES, losses))
  for bits in itertools.islice(everything(), 0, 81, 7):
    x = CHOICES.pick(bits)
    predicted = Problem(choices=CHOICES, objective=c).value(bits) / 2
    assert predicted == pytest.approx((losses.singles - losses.base)[x].sum())


def test_block_wise_variant_lies_between():
  g = matrix.matrix(CHOICES, random_losses(2))
  one_block = matrix.block_wise(CHOICES, g, dict.fromkeys(NAMES, 0))
  np.testing.assert_array_equal(one_block, g)
  alone = matrix.block_wise(CHOICES, g, {name: i for i, name in enumerate(NAMES)})
  np.testing.assert_array_equal(alone, np.diag(np.diag(g)))
  halves = matrix.block_wise(CHOICES, g, {"a": 0, "b": 1, "c": 0, "d": 1})
  cross = halves.reshape(4, 3, 4, 3).any(axis=(1, 3))
  np.testing.assert_array_equal(cross, np.tile(np.eye(2, dtype=bool), (2, 2)))
  np.testing.assert_array_equal(halves[halves != 0], g[halves != 0])
  with pytest.raises(ValueError, match="block: of layers"):
    matrix.block_wise(CHOICES, g, {"a": 0})


# Projection.


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_projection_is_the_nearest_semidefinite_matrix(seed):
  g = matrix.matrix(CHOICES, random_losses(seed))
  near, clipped = matrix.project(g)
  assert np.linalg.eigvalsh(near)[0] >= -1e-9
  np.testing.assert_array_equal(near, near.T)
  # Onto a convex cone: the rest is semidefinite, too, and at a right angle.
  assert np.linalg.eigvalsh(near - g)[0] >= -1e-9
  assert np.sum(near * (near - g)) == pytest.approx(0, abs=1e-8)
  assert clipped == pytest.approx(np.trace(near - g) / np.abs(np.linalg.eigvalsh(g)).sum())
  assert 0 < clipped < 1


def test_projection_keeps_what_is_semidefinite():
  root = np.random.default_rng(0).normal(size=(N, 5))
  near, clipped = matrix.project(root @ root.T)
  np.testing.assert_allclose(near, root @ root.T, atol=1e-12)
  assert clipped == pytest.approx(0, abs=1e-12)
  assert matrix.project(np.zeros((3, 3)))[1] == 0


# Programs.


@pytest.mark.parametrize("projected", [False, True])
def test_plans_are_those_of_trying_everything(projected):
  model = Quadratic(4)
  g = matrix.matrix(CHOICES, model.losses())
  g = matrix.project(g)[0] if projected else g
  limit, cost = 300, {n: s for n, s in zip(NAMES, (10, 30, 20, 5), strict=True)}
  best = min(
    increase(g, bits) for bits in everything() if sum(cost[n] * b for n, b in bits.items()) <= limit
  )
  for solver in ("milp", "local_search", "enumerate_all"):
    plan = solve(Problem(choices=CHOICES, objective=g, limits={"size": limit}), solver)
    assert plan.objective / 2 == pytest.approx(best)


def test_ignoring_interactions_can_only_lose():
  """On a quadratic loss: true loss of the plan from G against that from its diagonal."""
  better = 0
  for seed in range(8):
    model = Quadratic(seed)
    g = matrix.matrix(CHOICES, model.losses())
    plans = [
      solve(Problem(choices=CHOICES, objective=objective, limits={"size": 260}))
      for objective in (g, matrix.diagonal(g))
    ]
    full, independent = (model.loss(plan.bits) for plan in plans)
    assert full <= independent + 1e-12
    better += full < independent - 1e-6
  assert better


# Sanity check.


def test_highest_bits_are_best_where_errors_shrink_with_bits():
  g = np.diag(np.tile([4.0, 1.0, 0.1], 4)) + 0.01
  check = matrix.check_unconstrained(CHOICES, g)
  assert check.disagree == {}
  assert check.proven
  assert check.least == check.highest == pytest.approx((4 * 0.11 + 12 * 0.01) / 2)


def test_says_which_layers_would_be_lowered():
  g = np.diag(np.tile([4.0, 1.0, 0.1], 4))
  g[1, 3] = g[3, 1] = -10  # a at 4 bits with b at 2 bits
  check = matrix.check_unconstrained(CHOICES, g)
  assert check.disagree == {"a": 4, "b": 2}
  assert check.least == pytest.approx((1 + 4 - 20 + 0.2) / 2)
  assert check.highest == pytest.approx(0.2)


def test_equally_good_plans_are_no_disagreement():
  assert matrix.check_unconstrained(CHOICES, np.zeros((N, N))).disagree == {}


def test_projection_mends_the_check():
  """What it removes are the gains that the loss cannot have."""
  g = np.diag(np.tile([4.0, 1.0, 0.0], 4))
  g[1, 3] = g[3, 1] = -10
  assert matrix.check_unconstrained(CHOICES, g).disagree
  assert not matrix.check_unconstrained(CHOICES, matrix.project(g)[0]).disagree
