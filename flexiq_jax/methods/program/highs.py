"""Bit width programs as mixed-integer linear ones, solved by HiGHS (`scipy.optimize.milp`).

A quadratic objective becomes linear with a variable y for each product of options of two blocks,

    sum_b' y[i b, j b'] = x[i b],   sum_b y[i b, j b'] = x[j b'],   y >= 0,

which is exact for one-hot blocks whether G is positive semi-definite or not, and whose relaxation
is tighter than bounding each product by itself (McCormick). Sizes grow with the square of layers:
20 layers of 3 bit widths take 1,710 products, 52 take 11,934.
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from flexiq_jax.methods.program.blocks import Blocks

# HiGHS stops at an absolute gap of 1e-6, which SciPy cannot change: relative to this it is nothing.
_LARGEST = 1e3
_WHOLE = 1e6  # costs that are whole numbers up to this stay so; HiGHS makes use of it


def minimise(blocks: Blocks, time_limit: float) -> tuple[np.ndarray | None, float]:
  """Solves a program that has a solution.

  HiGHS counts a limit as met up to 1e-6 of the largest cost. A plan that uses this to break a limit
  is cut off by a row of its own, and the rest solved again: the bound stays valid.

  Args:
    blocks: the program.
    time_limit: seconds.

  Returns:
    `taken`, None where no plan was found in time, and the proven bound, -inf where there is none.
  """
  end = time.monotonic() + time_limit
  objective, rows, low, high = linear_program(blocks)
  scale = _LARGEST / max(np.abs(objective).max(), float(np.finfo(np.float64).tiny))
  m, bound = len(blocks.linear), -math.inf
  while (left := end - time.monotonic()) > 0:
    result = scipy.optimize.milp(
      objective * scale,
      integrality=np.arange(len(objective)) < m,
      bounds=scipy.optimize.Bounds(0, 1),
      constraints=scipy.optimize.LinearConstraint(rows, low, high),
      options={"time_limit": left, "mip_rel_gap": 0.0},
    )
    if result.status not in (0, 1):
      raise RuntimeError(f"HiGHS: {result.message}")
    if result.mip_dual_bound is not None:
      bound = max(bound, result.mip_dual_bound / scale)
    if result.x is None:
      break
    taken = blocks.least(-result.x[:m])
    if blocks.meets(taken):
      return taken, bound
    cut = scipy.sparse.csr_array(blocks.one_hot(taken)[None])
    cut.resize((1, len(objective)))
    rows = scipy.sparse.vstack([rows, cut], format="csr")
    low, high = np.append(low, -np.inf), np.append(high, len(taken) - 1)
  return None, bound


def cheapest(blocks: Blocks) -> np.ndarray:
  """A plan that meets all limits.

  Raises:
    ValueError: there is none. Names the first limit that cannot be met (together with those before
      it, where there are several), its value and the smallest one that could.
  """
  spread = blocks.costs / np.maximum(np.abs(blocks.costs).max(axis=1, keepdims=True), 1e-300)
  taken = blocks.least(spread.sum(axis=0))
  if blocks.meets(taken):
    return taken
  for k, (name, limit) in enumerate(zip(blocks.names, blocks.limits, strict=True)):
    cost = blocks.costs[k]
    before = dataclasses.replace(
      blocks,
      linear=cost,
      pairs=None,
      names=blocks.names[:k],
      costs=blocks.costs[:k],
      limits=blocks.limits[:k],
    )
    found = blocks.least(cost) if k == 0 else minimise(before, math.inf)[0]
    assert found is not None  # without a time limit, and those before can be met
    taken, smallest = found, float(cost[found].sum())
    if smallest > blocks.caps[k]:
      others = [f"{n} <= {v:.12g}" for n, v in zip(before.names, before.limits, strict=True)]
      given = f" with {' and '.join(others)}" if others else ""
      raise ValueError(
        f"limits: no choice of bits has {name} <= {limit:.12g}; the smallest{given} is "
        f"{smallest:.12g}"
      )
  return taken


def linear_program(blocks: Blocks) -> tuple[np.ndarray, Any, np.ndarray, np.ndarray]:
  """The linear program over v variables, all in 0..1, of which the first m are z, in {0, 1}.

  Returns:
    (objective `[v]`, sparse rows `[r, v]`, low `[r]`, high `[r]`): low <= rows . variables <= high.
  """
  m, starts, sizes = len(blocks.linear), blocks.starts, blocks.sizes
  objective, at, columns, values = [blocks.linear], [], [], []
  row, column = 0, m
  if blocks.pairs is not None:
    objective = [blocks.linear + np.diag(blocks.pairs)]
    for j in range(len(sizes)):
      for i in range(j):
        a, b = starts[i] + np.arange(sizes[i]), starts[j] + np.arange(sizes[j])
        product = 2 * blocks.pairs[np.ix_(a, b)]
        if not product.any():
          continue
        y = column + np.arange(product.size).reshape(product.shape)
        p, q = np.indices(product.shape)
        # y summed over the options of j, less z of i; y summed over the options of i, less z of j.
        at += [row + p.ravel(), row + np.arange(len(a)), row + len(a) + q.ravel()]
        at += [row + len(a) + np.arange(len(b))]
        columns += [y.ravel(), a, y.ravel(), b]
        values += [np.ones(y.size), -np.ones(len(a)), np.ones(y.size), -np.ones(len(b))]
        objective.append(product.ravel())
        row, column = row + len(a) + len(b), column + y.size
  one = scipy.sparse.csr_array((np.ones(m), (blocks.block, np.arange(m))), (len(sizes), column))
  scaled = [_row(c, h) for c, h in zip(blocks.costs, blocks.caps, strict=True)]
  costs = scipy.sparse.csr_array(np.array([c for c, _ in scaled]).reshape(-1, m))
  costs.resize((len(scaled), column))
  parts = [one, costs]
  if at:
    index = (np.concatenate(at), np.concatenate(columns))
    parts.append(scipy.sparse.csr_array((np.concatenate(values), index), (row, column)))
  low = np.concatenate([np.ones(len(sizes)), np.full(len(scaled), -np.inf), np.zeros(row)])
  high = np.concatenate([np.ones(len(sizes)), [h for _, h in scaled], np.zeros(row)])
  return np.concatenate(objective), scipy.sparse.vstack(parts, format="csr"), low, high


def _row(cost: np.ndarray, limit: float) -> tuple[np.ndarray, float]:
  """A limit in units that suit HiGHS: the greatest common divisor, or the largest cost."""
  largest = np.abs(cost).max() or 1.0
  if largest < 2**53 and np.array_equal(cost, np.rint(cost)):
    unit = int(np.gcd.reduce(cost.astype(np.int64))) or 1
    if largest / unit <= _WHOLE:
      return cost / unit, math.floor(limit / unit)
  return cost / largest, limit / largest
