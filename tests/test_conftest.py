"""What tests share, and what they must not."""

import jax

from tests import conftest


def test_programs_compiled_otherwise_are_forgotten():
  run = jax.jit(lambda x: x + 1)
  run(1.0)
  conftest.keep_apart(False)  # as this test is compiled
  assert run._cache_size() == 1
  conftest.keep_apart(True)
  assert run._cache_size() == 0
  conftest.keep_apart(False)
