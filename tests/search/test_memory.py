"""The largest block of examples that fits a budget; compilers made up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexiq_jax.search.memory import GIB, fit_block


@given(st.integers(0, 10), st.integers(1, 10), st.integers(1, 100), st.integers(1, 2000))
def test_a_block_fits_or_one_example_is_too_much(fixed, each, block, budget):
  tried = []

  def attempt(size):
    tried.append(size)
    return f"for {size}", fixed + each * size

  if fixed + each > budget:
    with pytest.raises(ValueError, match=r"memory: .* is too little; one example takes"):
      fit_block(attempt, block, budget / GIB, "one example")
    assert tried[-1] == 1
  else:
    found, made, used = fit_block(attempt, block, budget / GIB, "one example")
    assert made == f"for {found}" and used == fixed + each * found <= budget
  assert tried[0] == block and tried == sorted(set(tried), reverse=True)


def test_the_next_block_follows_the_budget():
  tried = []

  def attempt(size):
    tried.append(size)
    return None, 10 * size

  fit_block(attempt, 64, 320 / GIB, "one example")
  assert tried == [64, 28]  # 32 would just fit
