"""CLADO's matrix: what layers lose together (arXiv 2307.05657; code: JamesTuna/CLADO_MPQ).

The loss is measured with one layer quantized and with two, for all pairs of options k = (i, b):

    G[k, k] = 2 L[k],    G[k, k'] = L[k, k'] - L[k] - L[k']  for different layers,  else 0

with L the increase over the loss of the unquantized model. To second order in the errors w of the
weights, L = w' H w / 2, these are w_i' H_ij w_j: the Hessian's effect without a derivative. So for
one-hot x the predicted increase is x' G x / 2, exactly the measured one for every pair.

| symbol | meaning |
|---|---|
| n | options (program/problem.py) |
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from flexiq_jax.methods.program import Choices, Problem, solve


@dataclasses.dataclass(frozen=True)
class Losses:
  """Mean losses on the sensitivity set.

  Attributes:
    base: of the unquantized model.
    singles: float64 `[n]`, with one layer at an option.
    pairs: float64 `[n, n]`, with two layers at their options; entries k < k' are read, and none of
      those of one layer, whose value may be anything.
  """

  base: float
  singles: np.ndarray
  pairs: np.ndarray


def matrix(choices: Choices, losses: Losses, *, clip: bool = False) -> np.ndarray:
  """CLADO's G, float64 `[n, n]`: symmetric, and in general not positive semi-definite.

  Args:
    choices: the options.
    losses: what was measured.
    clip: takes a single whose loss is below the base, which noise can do, for one without effect.
      Predictions for pairs stay exact.

  Raises:
    ValueError: shapes that do not fit, or numbers that are not finite among those that are read.
  """
  n = choices.total
  single, pair = (np.asarray(a, np.float64) - losses.base for a in (losses.singles, losses.pairs))
  for field, values, shape in (("singles", single, (n,)), ("pairs", pair, (n, n))):
    if values.shape != shape:
      raise ValueError(f"{field}: shape {values.shape}, expected {shape}")
  read = np.triu(choices.layer[:, None] != choices.layer[None], 1)
  for field, values in (("singles", single), ("pairs", pair[read])):
    if not np.isfinite(values).all():
      raise ValueError(f"{field}: {int((~np.isfinite(values)).sum())} losses are not finite")
  if clip:
    single = np.maximum(single, 0)
  above = np.where(read, pair - single[:, None] - single[None], 0.0)
  return above + above.T + np.diag(2 * single)


def diagonal(g: np.ndarray) -> np.ndarray:
  """The variant with independent errors: the objective c `[n]` of a linear program."""
  return np.diag(g).copy()


def block_wise(choices: Choices, g: np.ndarray, block: Mapping[str, int]) -> np.ndarray:
  """The variant that keeps interactions inside blocks of layers only, `[n, n]`.

  Args:
    choices: the options.
    g: CLADO's matrix.
    block: layer name -> number of its block.
  """
  if set(block) != set(choices.names):
    raise ValueError(f"block: of layers {sorted(block)}; expected {sorted(choices.names)}")
  own = np.array([block[name] for name in choices.names])[choices.layer]
  return np.where(own[:, None] == own[None], g, 0.0)


def project(g: np.ndarray) -> tuple[np.ndarray, float]:
  """The nearest positive semi-definite matrix, in the Frobenius norm.

  The projection also fills entries for two bit widths of one layer; no one-hot x sees them.

  Args:
    g: float64 `[n, n]`, symmetric.

  Returns:
    The matrix, and the share of negative eigenvalues, 0..1, in the sum of all magnitudes: what was
    clipped.
  """
  values, vectors = np.linalg.eigh(g)
  kept = np.maximum(values, 0)
  size = np.abs(values).sum()
  nearest = (vectors * kept) @ vectors.T
  clipped = float((kept - values).sum() / size) if size else 0.0
  return (nearest + nearest.T) / 2, clipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """Whether the model prefers the highest bits everywhere if they are free.

  Attributes:
    disagree: layers that it would lower -> to how many bits. Empty is as it should be.
    highest: predicted increase with the highest bits everywhere.
    least: predicted increase of the plan found.
    proven: whether the plan found has the least one. Disagreement is certain even if not.
  """

  disagree: dict[str, int]
  highest: float
  least: float
  proven: bool


def check_unconstrained(
  choices: Choices, g: np.ndarray, *, time_limit: float = 60.0, seed: int = 0
) -> Check:
  """Solves the program without limits, whose answer must be the highest bits in all layers.

  It is not where errors at few bits are so large that the loss is no longer quadratic in them: some
  pairs then lose less together than alone, and the model takes that for a gain.
  """
  problem = Problem(choices=choices, objective=g)
  highest = choices.uniform(max)
  plan, value = solve(problem, time_limit=time_limit, seed=seed), problem.value(highest)
  fine = value <= plan.objective + 1e-9 * max(abs(value), np.abs(g).max())
  lower = {n: b for n, b in plan.bits.items() if b != highest[n]}
  return Check(
    disagree={} if fine else lower,
    highest=value / 2,
    least=min(value, plan.objective) / 2,
    proven=plan.optimal,
  )
