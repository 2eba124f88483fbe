"""JAX's configuration for a while."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def configured(**settings: object) -> Iterator[None]:
  """JAX's configuration with these values, without their prefix `jax_`."""
  settings = {f"jax_{name}": value for name, value in settings.items()}
  before = {name: jax.config.values[name] for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
