"""Device memory: what a compiled function takes, and the largest block of examples that fits."""

from collections.abc import Callable
from typing import TypeVar

import jax

GIB = 2**30
_T = TypeVar("_T")


def memory_of(compiled: jax.stages.Compiled) -> int:
  """Bytes that a compiled function takes on a device: arguments, temporaries and results."""
  memory = compiled.memory_analysis()
  if memory is None:  # a backend that does not say
    return 0
  sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
  return sum(sizes)


def fit_block(
  attempt: Callable[[int], tuple[_T, int]], block: int, memory: float, what: str
) -> tuple[int, _T, int]:
  """The first block, from the largest on down, whose function fits a budget.

  Args:
    attempt: examples in a block -> the function compiled for it, and the bytes that it takes.
    block: the largest.
    memory: budget in GiB.
    what: takes the memory of a block of one example; for the error.

  Returns:
    The block, its function, and the bytes that it takes.

  Raises:
    ValueError: one example takes more than the budget.
  """
  budget = memory * GIB
  while True:
    made, used = attempt(block)
    if used <= budget:
      return block, made, used
    if block == 1:
      raise ValueError(f"memory: {memory:g} GiB is too little; {what} takes {used / GIB:.3g} GiB")
    # Most of the memory grows with the block; a tenth less than its share saves a compilation.
    block = max(1, min(block - 1, int(block * budget / used * 0.9)))
