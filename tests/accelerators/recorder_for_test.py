"""Runs a job without computing anything, and remembers every function that it compiles.

Within `recording`, a function under `jax.jit` is only traced: it returns zeros of the right shapes,
and what it was and what it was called with are kept. So a test can run a calibration, a search or a
server as its users do, and afterwards compile each of its functions for an accelerator. Functions
that were jitted when their module was imported are not seen; they are few and compute nothing of a
model.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

_jit = jax.jit


@dataclasses.dataclass(frozen=True)
class Call:
  """One function and what it was called with.

  Attributes:
    name: of the function, where it is defined.
    jitted: the function under `jax.jit`.
    arguments, keywords: of the call; arrays are shapes.
  """

  name: str
  jitted: Any
  arguments: tuple
  keywords: dict[str, Any]

  def lower(self, target) -> jax.stages.Lowered:
    """Lowers it for an accelerator (`targets_for_test.Target`)."""
    return self.jitted.lower(*target.placed(self.arguments), **target.placed(self.keywords))


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
  """Yields the calls of what runs inside; the same function on the same shapes counts once."""
  calls: list[Call] = []
  seen, over = set(), False

  def record(name, jitted, arguments, keywords):
    if over:  # a function that somebody keeps
      return False
    shapes = jax.tree.map(_shape, (arguments, keywords))
    leaves, tree = jax.tree.flatten(shapes)
    key = (id(jitted), tree, tuple(map(str, leaves)))
    if key not in seen:
      seen.add(key)
      calls.append(Call(name, jitted, *shapes))
    return True

  def jit(function=None, **options):
    if function is None:
      return functools.partial(jit, **options)
    return _Recorded(function, _jit(function, **options), record)

  with mock.patch.object(jax, "jit", jit):
    yield calls
  over = True


class _Recorded:
  """What stands for a jitted function."""

  def __init__(self, function, jitted, record):
    inner = function
    while isinstance(inner, functools.partial):
      inner = inner.func
    self._name = inner.__qualname__.replace(".<locals>", "")
    self._jitted, self._record = jitted, record

  def __call__(self, *arguments, **keywords):
    leaves = jax.tree.leaves((arguments, keywords))
    inside = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)  # of another function
    if inside or not self._record(self._name, self._jitted, arguments, keywords):
      return self._jitted(*arguments, **keywords)
    shapes = self._jitted.eval_shape(*arguments, **keywords)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)

  def lower(self, *arguments, **keywords):
    self._record(self._name, self._jitted, arguments, keywords)
    return self

  def compile(self):
    return self

  def memory_analysis(self):
    return None


def _shape(leaf: Any) -> Any:
  if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf
