"""A lower bound of a convex bit width program: fractions of options instead of whole ones.

Pairwise Frank-Wolfe: each step solves a linear program at the gradient g and shifts weight from the
worst vertex so far to the one found. At any z, converged or not, convexity gives for all allowed z'

    f(z') >= f(z) + g . (z' - z),   min g . z' >= sum_j min_{r in j} (g + costs' u)_r - u . limits

for any prices u >= 0 of the limits, so the bound does not depend on a solver's tolerances.

Before, a share t of the diagonal D goes from squares to linear terms, z' (G - t D) z + t D . z: the
same for whole z and larger for fractions. t is the largest that keeps the program convex; without
interactions it is 1, and the bound that of a linear program.
"""

import math
import time

import numpy as np
import scipy.optimize
import scipy.sparse

from flexiq_jax.methods.program.blocks import Blocks

_CLOSE = 1e-3  # relative distance of the bound to the relaxation's value at which it stops
_STEPS = 500


def lower_bound(blocks: Blocks, start: np.ndarray, time_limit: float) -> float:
  """No plan has a lower objective than this.

  Args:
    blocks: a program with `blocks.convex()`.
    start: `taken` of a plan that meets the limits.
    time_limit: seconds.
  """
  end = time.monotonic() + time_limit
  m = len(blocks.linear)
  pairs = np.zeros((m, m)) if blocks.pairs is None else blocks.pairs
  linear, pairs = _sharpened(blocks.linear, pairs)
  vertices, weights, bound = [blocks.one_hot(start)], np.ones(1), -math.inf
  for _ in range(_STEPS):
    z = weights @ np.array(vertices)
    gradient = linear + 2 * pairs @ z
    value = float(linear @ z + z @ pairs @ z)
    vertex, least = _vertex(blocks, gradient)
    bound = max(bound, value - float(gradient @ z) + least)
    if value - bound <= _CLOSE * abs(value) or time.monotonic() > end:
      break
    worst = int(np.argmax(np.array(vertices) @ gradient))
    toward = vertex - vertices[worst]
    slope, curve = float(gradient @ toward), float(toward @ pairs @ toward)
    if slope >= 0:  # what is left is the linear program's tolerance
      break
    step = weights[worst] if 2 * curve * weights[worst] <= -slope else -slope / (2 * curve)
    same = [i for i, v in enumerate(vertices) if np.array_equal(v, vertex)]
    if not same:
      vertices, weights = [*vertices, vertex], np.append(weights, 0.0)
    weights[same[0] if same else -1] += step
    weights[worst] -= step
    keep = weights > 0
    vertices = [v for v, kept in zip(vertices, keep, strict=True) if kept]
    weights = weights[keep] / weights[keep].sum()
  return bound


def _sharpened(linear: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  diagonal = np.maximum(np.diag(pairs), 0)
  size = np.sqrt(np.where(diagonal > 0, diagonal, 1))
  relative = pairs / size[:, None] / size + np.diag(diagonal == 0)  # else nothing could be moved
  share = min(max(float(np.linalg.eigvalsh(relative)[0]) - 1e-9, 0.0), 1.0)
  return linear + share * diagonal, pairs - share * np.diag(diagonal)


def _vertex(blocks: Blocks, gradient: np.ndarray) -> tuple[np.ndarray, float]:
  """A vertex of least gradient . z, and a lower bound of that minimum."""
  m, prices = len(gradient), np.zeros(len(blocks.limits))
  scale = np.abs(gradient).max() or 1.0
  if len(blocks.limits):
    unit = np.maximum(np.abs(blocks.costs).max(axis=1), 1e-300)
    one = scipy.sparse.csr_array((np.ones(m), (blocks.block, np.arange(m))))
    result = scipy.optimize.linprog(
      gradient / scale,
      A_ub=blocks.costs / unit[:, None],
      b_ub=blocks.caps / unit,
      A_eq=one,
      b_eq=np.ones(len(blocks.sizes)),
    )
    if result.status != 0:
      raise RuntimeError(f"HiGHS: {result.message}")
    prices = np.maximum(-result.ineqlin.marginals, 0) * scale / unit
    vertex = result.x
  else:
    vertex = blocks.one_hot(blocks.least(gradient))
  priced = gradient + prices @ blocks.costs
  least = np.minimum.reduceat(priced, blocks.starts).sum() - prices @ blocks.caps
  return vertex, float(least)
