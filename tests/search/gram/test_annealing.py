"""Moves of the annealing, one by one, against the quadratic written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.search.gram import annealing

TOTAL, FROZEN = 16, 3
COST = np.array([5, 3, 1, 11, 8, 2, 4, 9, 16, 7, 2, 13, 6, 3, 5, 40])  # the last ones are frozen
END = TOTAL - FROZEN

propose = jax.jit(annealing.propose)
flip = jax.jit(annealing.flip)


class Flips:
  """A quadratic in flips s of the first 13 of 16 groups, and the state of a chain at some s."""

  def __init__(self, seed, flipped=0.4):
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(TOTAL, 9))
    self.gram, self.gradient = effects @ effects.T, rng.normal(size=TOTAL)
    self.base = rng.random(TOTAL) < 0.5
    self.s = (rng.random(TOTAL) < flipped) & (np.arange(TOTAL) < END)
    segment = np.where(self.base, 0, 2) + (self.base == self.s)
    segment[END:] = 4
    counts = np.cumsum(np.bincount(segment, minlength=5))
    cost = COST[self.base ^ self.s].sum()
    self.mid = counts[1]
    self.threshold = cost - rng.integers(0, 12)
    self.model = annealing.Model(
      gram=jnp.asarray(self.gram, jnp.float32),
      cost=jnp.asarray(COST, jnp.int32),
      threshold=jnp.int32(self.threshold),
      mid=jnp.int32(self.mid),
      end=jnp.int32(END),
    )
    self.chain = annealing.Chain(
      slots=jnp.asarray(np.argsort(segment, kind="stable"), jnp.int32),
      lo=jnp.int32(counts[0]),
      hi=jnp.int32(counts[2]),
      h=jnp.asarray(self.gradient + self.gram @ self.s, jnp.float32),
      cost=jnp.int32(cost),
      gain=jnp.float32(0),
    )

  def value(self, s):
    return 2 * self.gradient @ s + s @ self.gram @ s

  def read(self, chain):
    """The flips that slots and borders say, after a look at their halves."""
    slots, lo, hi = (np.asarray(a) for a in (chain.slots, chain.lo, chain.hi))
    np.testing.assert_array_equal(np.sort(slots), np.arange(TOTAL))
    np.testing.assert_array_equal(np.sort(slots[END:]), np.arange(END, TOTAL))
    assert self.base[slots[: self.mid]].all() and not self.base[slots[self.mid : END]].any()
    return np.isin(np.arange(TOTAL), slots[lo:hi])


@pytest.mark.parametrize("seed", range(6))
def test_moves_are_what_they_say_and_keep_budget_and_limit(seed):
  problem = Flips(seed)
  limit = int(problem.s.sum()) + seed % 2
  draws = jax.random.uniform(jax.random.key(seed), (4, 400))
  moves = jax.tree.map(np.asarray, propose(problem.model, problem.chain, jnp.int32(limit), draws))
  slots, inside = np.asarray(problem.chain.slots), problem.base ^ problem.s
  kinds, refused_in_vain = set(), 0
  for k in range(400):
    s = problem.s.copy()
    if moves.out[k] and inside[:END].any():
      assert inside[slots[moves.leave[k]]]
      s[slots[moves.leave[k]]] ^= True
    if moves.into[k] and not inside[:END].all():
      assert not inside[slots[moves.enter[k]]]
      s[slots[moves.enter[k]]] ^= True
    assert not s[END:].any()
    after = problem.base ^ s
    assert moves.cost[k] == COST[after].sum()
    np.testing.assert_allclose(
      moves.gain[k], problem.value(s) - problem.value(problem.s), rtol=1e-4, atol=1e-4
    )
    free = COST[:END][after[:END]]
    spare = moves.cost[k] - problem.threshold
    fine = s.sum() <= limit and 0 <= spare < max(free, default=0)
    assert fine or not moves.allowed[k]
    refused_in_vain += fine and not moves.allowed[k]
    kinds.add((bool(moves.out[k]), bool(moves.into[k])))
  assert kinds == {(True, True), (True, False), (False, True)}
  assert moves.allowed.any() and not moves.allowed.all()
  assert refused_in_vain == 0  # with as many draws every group inside is a witness


def test_nothing_is_drawn_from_an_empty_side():
  for base in (True, False):
    problem = Flips(0, flipped=0)
    border = jnp.int32(END * base)
    # Equal costs, and a mask that costs one too much: the budget has nothing against swaps.
    cost = jnp.full(TOTAL, 4, jnp.int32)
    model = problem.model.replace(mid=border, cost=cost, threshold=jnp.int32(99))
    chain = problem.chain.replace(lo=border, hi=border, cost=jnp.int32(100))
    draws = jax.random.uniform(jax.random.key(0), (4, 400))
    moves = propose(model, chain, jnp.int32(TOTAL), draws)
    needs = np.asarray(moves.into if base else moves.out)
    assert not np.asarray(moves.allowed)[needs].any()


def test_flips_keep_the_books():
  problem = Flips(1)
  chain, s, rng = problem.chain, problem.s.copy(), np.random.default_rng(0)
  for number in range(60):
    slot = int(rng.integers(END))
    before = np.asarray(chain.slots)
    do = number % 5 > 0
    inside = problem.base ^ s
    chain = flip(problem.model, chain, jnp.int32(slot), jnp.bool(do))
    s[before[slot]] ^= do
    np.testing.assert_array_equal(problem.read(chain), s)
    np.testing.assert_allclose(chain.h, problem.gradient + problem.gram @ s, rtol=1e-4, atol=1e-4)
    # The group that a swap flips next, on the other side, has not moved.
    other = inside[before] != inside[before[slot]]
    np.testing.assert_array_equal(np.asarray(chain.slots)[other], before[other])
