"""Compiled programs are large: they go when a module's tests are done."""

import jax
import pytest

from tests.accelerators import jobs_for_test as jobs


@pytest.fixture(autouse=True, scope="module")
def caches():
  """Clears what the module's tests compiled, and the models that hold on to it."""
  yield
  jobs.made.cache_clear()
  jobs.built.cache_clear()
  jax.clear_caches()
