"""Sums over examples that make a quadratic model of a fitness, whoever measures the effects.

| symbol | meaning |
|---|---|
| T | channel groups, or ties of them |
| a_i | matrix `[T, T]` of one example: inner products of its effects |
"""

from collections.abc import Callable

import numpy as np

from flexiq_jax.runs import distributed
from flexiq_jax.search.gram.surrogate import Quadratic, ledoit_wolf

# Share of the examples seen so far -> None.
Report = Callable[[float], None]


class Sums:
  """Adds blocks of examples up, in float64."""

  def __init__(self, total: int):
    """Starts with no example; `total` is T."""
    self._value, self._gradient = np.float64(0), np.zeros(total)
    self._gram, self._squares = np.zeros((total, total)), np.zeros((total, total))

  def add_slope(self, distances: np.ndarray, gradient: np.ndarray) -> None:
    """Takes in what a block says about the mask around which is measured.

    Args:
      distances: `[b]`, of its examples.
      gradient: `[T]`, the sum over its examples.
    """
    self._value += np.asarray(distances, np.float64).sum()
    self._gradient += gradient

  def add_gram(self, gram: np.ndarray, squares: np.ndarray) -> None:
    """Takes in what one example or a block says about the effects.

    Args:
      gram: `[T, T]`, the sum of the a_i.
      squares: `[T, T]`, the sum of the a_i * a_i, elementwise.
    """
    self._gram += gram
    self._squares += squares

  def model(self, base: np.ndarray, examples: int) -> tuple[Quadratic, float]:
    """The means, over the examples of all processes.

    Args:
      base: bool `[T]`, the mask around which was measured.
      examples: how many were added, in all processes together.

    Returns:
      The quadratic model, and the share by which its Gram matrix is better shrunk toward its
      diagonal.
    """
    sums = (self._value, self._gradient, self._gram, self._squares)
    value, gradient, gram, squares = (distributed.sum_parts(part) / examples for part in sums)
    model = Quadratic(base=np.asarray(base), value=float(value), gradient=gradient, gram=gram)
    return model, ledoit_wolf(gram, squares, examples)
