"""Rounding by the output's error, against its definition in NumPy and every single change."""

import jax
import numpy as np
import pytest

from flexiq_jax.finetuning.rounding import covariance, round_weights

_solve = jax.jit(round_weights, static_argnames="sweeps")


def lower(codes, shifts):
  return np.clip(np.rint(codes / 2.0**shifts), -8, 7).astype(int) << shifts


class Problem:
  """A layer's outputs at three ratios, from data: nothing of it is shared with the code."""

  def __init__(self, seed, rows=9, outputs=5, per_output=False):
    rng = np.random.default_rng(seed)
    self.data = rng.normal(size=(3, 200, rows)) @ rng.normal(size=(rows, rows)) * 20 + 7
    self.mean = self.data[0].mean(axis=0)
    self.weights = np.clip(rng.normal(size=(rows, outputs)) * 40, -126, 126)
    self.codes = np.rint(self.weights).astype(int)
    self.shifts = rng.integers(0, 5, (rows, outputs if per_output else 1))
    self.low = np.stack([np.zeros(rows, bool), rng.random(rows) < 0.5, np.ones(rows, bool)])
    self.steps = rng.uniform(0.5, 2, outputs)

  def errors(self, codes):
    found, mean = [], self.mean @ (codes - self.weights) * self.steps
    for x, low in zip(self.data, self.low, strict=True):
      used = np.where(low[:, None], lower(codes, self.shifts), codes)
      y = (x - x.mean(axis=0)) @ (used - self.weights) * self.steps
      found.append((np.square(y).mean(axis=0) + np.square(mean)).sum())
    return np.array(found)

  def solve(self, sweeps=50, balance=1.0):
    moments = [covariance(len(x), x.sum(axis=0), x.T @ x) for x in self.data]
    return _solve(
      *(np.stack(moments), self.mean.astype(np.float32)),
      *(self.weights.astype(np.float32), self.codes.astype(np.int32)),
      *(self.shifts.astype(np.int32), self.low, self.steps.astype(np.float32)),
      sweeps=sweeps,
      balance=balance,
    )


@pytest.mark.parametrize("seed", range(4))
def test_errors_are_those_of_the_outputs(seed):
  problem = Problem(seed)
  found = problem.solve()
  np.testing.assert_allclose(found.before, problem.errors(problem.codes), rtol=1e-3)
  np.testing.assert_allclose(found.after, problem.errors(np.asarray(found.codes)), rtol=1e-3)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_single_code_could_be_better(seed, per_output, balance):
  problem = Problem(seed, per_output=per_output)
  codes = np.asarray(problem.solve(balance=balance).codes).astype(int)
  share = problem.errors(problem.codes) ** -balance
  total = lambda codes: (problem.errors(codes) * share).sum()
  least = total(codes)
  assert least < 0.98 * total(problem.codes)
  assert np.abs(codes).max() <= 127
  spread = np.broadcast_to(problem.shifts, codes.shape)
  for row in range(codes.shape[0]):
    for output in range(codes.shape[1]):
      e, now = spread[row, output], lower(codes, problem.shifts)[row, output]
      for code in range(-127, 128):
        # Its own 4-bit code or one beside it.
        if abs((lower(np.array(code), e) >> e) - (now >> e)) > 1:
          continue
        other = codes.copy()
        other[row, output] = code
        assert total(other) >= least * (1 - 1e-4), (row, output, code)


def test_a_ratio_without_error_keeps_it():
  """Every weight is a code, and no channel loses bits: nothing is to be gained."""
  problem = Problem(0)
  problem.weights = problem.weights.round() % 8
  problem.codes, problem.shifts = problem.weights.astype(int), 0 * problem.shifts
  found = problem.solve()
  assert np.array_equal(found.codes, problem.codes)
  assert not np.asarray(found.after).any()


def test_less_balance_favours_the_largest_error():
  problem = Problem(1)
  even, summed = (problem.solve(balance=balance).after for balance in (1.0, 0.0))
  largest = int(np.argmax(problem.errors(problem.codes)))
  assert summed[largest] < even[largest]


def test_covariance_is_numpys():
  x = np.random.default_rng(0).normal(size=(50, 4)) + 100
  found = covariance(50, x.sum(axis=0), x.T @ x)
  np.testing.assert_allclose(found, np.cov(x.T, bias=True), rtol=1e-4, atol=1e-4)
  found = covariance(50, x.sum(axis=0), x.T @ x, central=False)
  np.testing.assert_allclose(found, x.T @ x / 50, rtol=1e-6)
